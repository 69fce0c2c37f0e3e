"""Train a GPT on a text file: the same as `gptjax train`.

python train.py --config small                              # Tiny Shakespeare, a few minutes
python train.py --config small --optim.learning-rate 1e-3   # any field can be set
python train.py --config my_config.py                       # a config file, with your own model
python train.py --data.text my.txt --run mine               # your own text
python train.py --run mine --resume                         # continue an interrupted run
python train.py --config gpt2-xl --plan v5e:4x4             # estimate what that would take
python sample.py                                            # generate text from the newest run
"""

import sys

from gptjax.cli.main import run

if __name__ == "__main__":
    run("train", sys.argv[1:], "train.py")
