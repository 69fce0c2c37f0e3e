"""What a run's model does with a text, as numbers: attention, losses of tokens, near embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError
from gptjax.parallel.switches import pinned
from gptjax.runs.loaded import LoadedRun
from gptjax.score.score import score_text
from gptjax.text import special_tokens
from gptjax.text.tokenizers import INCOMPLETE, Tokenizer, UnknownCharacters


def token_names(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text of each of (N,) tokens; of one without, or with a part of a character, its id."""
    names = ((token, tokenizer.decode([token])) for token in np.asarray(ids).tolist())
    return [name if name.strip(INCOMPLETE) else f"#{token}" for token, name in names]


def encode(run: LoadedRun, text: str, at_least: int = 1) -> np.ndarray:
    """(N,) ids of a text, with the tokens that the run's tokenizer puts around one.

    Raises:
        UserError: a character that the tokenizer lacks, or fewer tokens.
    """
    ids = special_tokens.around(run.tokenizer, _ids(run.tokenizer, text))
    if len(ids) < at_least:
        raise UserError(f"the text has {len(ids)} tokens; give one of {at_least} or more")
    return ids


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UnknownCharacters as error:
        raise UserError(f"{error.found}; remove them from the text") from None


@pinned()
def attention_weights(run: LoadedRun, text: str) -> tuple[list[str], np.ndarray]:
    """Where each head looks.

    Args:
        run: whose model keeps its attention weights, as a `GPT` does.
        text: that fits into the context.

    Returns:
        T tokens, and (L, H, T, T) weights: of every layer and head, for each reading token (a row,
        which sums to 1) the tokens it reads from. They are 0 where the mask forbids.

    Raises:
        UserError: a text that is too long, or a model without such weights.
    """
    ids, most = encode(run, text), run.config.model.block_size
    if len(ids) > most:
        raise UserError(
            f"the text has {len(ids)} tokens, and the context of {run.directory} holds {most}; "
            f"give a shorter one"
        )
    variables = {"params": run.params}
    _, kept = run.model.apply(variables, jnp.asarray(ids)[None], mutable=["attention"])
    found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(dict(kept))]
    T = len(ids)
    if not found or any(leaf.shape[-2:] != (T, T) for leaf in found):
        raise UserError(
            f"the model {type(run.model).__name__} of {run.directory} keeps no attention weights; "
            f"an attention of your own keeps them if its `attend` calls `weigh`"
        )
    return token_names(run.tokenizer, ids), np.concatenate(
        [leaf.reshape(-1, *leaf.shape[-3:]) for leaf in found]
    )


def losses_of_tokens(
    run: LoadedRun, text: str, most: int | None = None
) -> tuple[list[str], np.ndarray]:
    """The loss of each token of a text, after half a context of the text before it or more.

    Args:
        run: of any model.
        text: any text.
        most: tokens that are of use; None: any number.

    Returns:
        N tokens, and (N,) float32 nats; NaN for the first, which nothing predicts.

    Raises:
        UserError: a character that the tokenizer lacks, fewer than two tokens, or more than `most`.
    """
    ids = encode(run, text, at_least=2)
    if most is not None and len(ids) > most:
        raise UserError(
            f"the text has {len(ids):,} tokens, and a picture holds {most:,}; give a shorter one, "
            f"or see gptjax score"
        )
    return token_names(run.tokenizer, ids), -score_text(run, text).logprobs


def neighbours(
    run: LoadedRun, text: str, count: int = 8
) -> tuple[list[str], list[list[str]], np.ndarray]:
    """The tokens whose embeddings are nearest to those of a text's tokens.

    Args:
        run: whose model has an embedding table `wte`, (V, C).
        text: its distinct tokens are looked at, in order.
        count: neighbours of each token; fewer, if the vocabulary is smaller.

    Returns:
        N tokens, for each its neighbours, nearest first, and (N, count) float32 cosines.

    Raises:
        UserError: a character that the tokenizer lacks, no token, or no such table.
    """
    V = run.tokenizer.vocab_size  # the table may have rows for tokens that do not exist
    ids = _ids(run.tokenizer, text)
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    if not len(ids):
        raise UserError("the text has no tokens; give one or more")
    table = run.params.get("wte", {}).get("embedding") if isinstance(run.params, dict) else None
    if table is None:
        raise UserError(
            f"the model {type(run.model).__name__} of {run.directory} has no parameter "
            f"wte/embedding, so that its tokens have no neighbours"
        )
    table = np.asarray(table, np.float32)[:V]
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    cosines = table[ids] @ table.T  # (N, V)
    cosines[np.arange(len(ids)), ids] = -np.inf
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, V - 1)]
    names = [token_names(run.tokenizer, row) for row in nearest]
    return token_names(run.tokenizer, ids), names, np.take_along_axis(cosines, nearest, axis=1)
