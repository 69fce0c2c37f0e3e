"""Tests of the page of `gptjax serve`, in a real browser."""

from collections.abc import Iterator

import pytest
from browser import CONTROL, ENTER, ESCAPE, LEFT, SHIFT, TAB, Browser, browser
from serve_helpers import Live, serving, small_runs

READY = "document.getElementById('run').value !== ''"
SET = """
const slider = document.getElementById(arguments[0]);
slider.value = arguments[1];
slider.dispatchEvent(new Event("input"));
"""
VISIBLE = "return tokens.findIndex((token, i) => i > 4 && token.text.trim() !== '')"
MIDDLE = """
const box = colours.querySelector(`[data-i="${arguments[0]}"]`).getClientRects()[0];
return [box.x + box.width / 2, box.y + box.height / 2];
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, play: str) -> Iterator[tuple[Browser, Live]]:
    with (
        browser() as opened,  # skips where there is none, before anything is trained
        small_runs(tmp_path_factory.mktemp("page"), play) as runs,
        serving(runs / "small") as live,
    ):
        yield opened, live


@pytest.fixture
def fresh(page: tuple[Browser, Live]) -> tuple[Browser, Live]:
    opened, live = page
    opened.open(live.url)
    opened.wait(READY)
    opened.run(SET, "tokens", 20)
    return page


def text(opened: Browser) -> str:
    return opened.run("return area.value")


def status(opened: Browser) -> str:
    return opened.run("return document.getElementById('status').textContent")


def generated(opened: Browser) -> str:
    opened.wait("!running && tokens.length > 0 && frame === 0")
    assert opened.run("return document.getElementById('status').className") == ""
    return text(opened)


def test_write_and_continue_by_keyboard(fresh: tuple[Browser, Live]):
    opened, live = fresh
    opened.run("document.getElementById('seed').value = 7")
    opened.run("document.getElementById('text').focus()")
    opened.keys("KING<b>")
    opened.keys(CONTROL, ENTER)
    asked = {"prompt": "KING<b>", "max_tokens": 20, "seed": 7, "temperature": 0.8}
    assert generated(opened) == "KING<b>" + live.post(**asked)["choices"][0]["text"]
    # What a sample or a prompt holds is shown as text.
    assert opened.run("return colours.querySelector('b')") is None
    assert opened.run("return colours.textContent") == text(opened) + "\u200b\n"
    # Both layers have the same lines.
    assert opened.run("return area.scrollHeight <= colours.offsetHeight")
    # The text is the spans', token by token.
    spans = opened.run("return [...colours.querySelectorAll('span')].map(s => s.textContent)")
    assert len(spans) == 20 and "".join(spans) == text(opened)[7:]


def test_a_token_that_is_pointed_at(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    opened.keys(CONTROL, ENTER)
    generated(opened)
    i = opened.run(VISIBLE)
    opened.point(*opened.run(MIDDLE, i))
    opened.wait(f"colours.querySelector('.on')?.dataset.i === '{i}'")
    shown = opened.run("return document.getElementById('token').textContent")
    logprob, top = opened.run("return [tokens[arguments[0]].logprob, tokens[arguments[0]].top]", i)
    assert f"surprise {-logprob / 0.6931471805599453:.1f} bits" in shown
    rows = opened.run("return [...document.querySelectorAll('#others b')].map(b => b.textContent)")
    assert len(rows) == len(top) == 8 and all(rows)


def test_another_token_is_taken_and_continued_after(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    opened.keys(CONTROL, ENTER)
    before, i = generated(opened), opened.run(VISIBLE)
    opened.point(*opened.run(MIDDLE, i), click=True)
    top, text = opened.run("return [tokens[arguments[0]].top, tokens[arguments[0]].text]", i)
    row = next(row for row, other in enumerate(top) if other[0] != text)
    button = "document.querySelectorAll('#others button')[arguments[0]]"
    place = f"const box = {button}.getBoundingClientRect(); return [box.x + 9, box.y + 9]"
    opened.point(*opened.run(place, row), click=True)
    opened.wait(f"!running && tokens.length === {i + 20}")
    after = generated(opened)
    assert after.startswith(before[:i] + top[row][0]) and len(after) == i + 1 + 20


def test_edit_in_the_middle_and_continue_from_there(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    opened.run("document.getElementById('text').focus()")
    opened.keys("AB")
    opened.keys(CONTROL, ENTER)
    before = generated(opened)
    opened.run("area.focus(); area.setSelectionRange(tokens[10].start, tokens[10].start)")
    opened.keys("XY")
    # The figures of what follows the edit were those after another text.
    assert opened.run("return tokens.length") == 10
    assert text(opened) == before[:12] + "XY" + before[12:]
    opened.keys(CONTROL, SHIFT, ENTER)
    opened.wait("running || tokens.length === 30")
    after = generated(opened)
    assert after.startswith(before[:12] + "XY") and len(after) == 14 + 20
    opened.keys(LEFT)  # the cursor's token is shown, when the browser says that the cursor moved
    opened.wait("document.querySelector('#colours .on') !== null")


def test_stop(fresh: tuple[Browser, Live]):
    opened, live = fresh
    opened.run("document.getElementById('tokens').max = 65536")
    for stop in (
        lambda: opened.keys(ESCAPE),
        lambda: opened.run("document.getElementById('stop').click()"),
    ):
        opened.run(SET, "tokens", 65536)
        opened.keys(CONTROL, ENTER)
        opened.wait("running && tokens.length > 5")
        stop()
        opened.wait("!running")
        assert "stopped after" in status(opened)
        live.wait_until_idle()
        opened.run("area.value = ''; edited()")


def test_another_run_and_checkpoint(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    names = "return [...document.getElementById(arguments[0]).options].map(o => o.textContent)"
    assert opened.run(names, "run") == ["small", "<b>"]
    choose = """
    const select = document.getElementById(arguments[0]);
    select.value = arguments[1];
    select.dispatchEvent(new Event("change"));
    """
    opened.run(choose, "run", "<b>")
    assert opened.run(names, "checkpoint") == ["the server's", "best", "last", "80", "40"]
    opened.run(choose, "checkpoint", "40")
    opened.keys(CONTROL, ENTER)
    generated(opened)
    assert status(opened).startswith("<b>@40: 20 tokens in ")


def test_an_error_is_said(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    opened.run("document.getElementById('seed').value = 'x'")
    opened.keys(CONTROL, ENTER)
    opened.wait("document.getElementById('status').className === 'wrong'")
    assert status(opened).startswith("seed: expected an integer")


def test_every_control_is_reached_by_tab(fresh: tuple[Browser, Live]):
    opened, _ = fresh
    reached = set()
    for _ in range(40):
        opened.keys(TAB)
        reached.add(opened.run("return document.activeElement.id"))
    controls = "run checkpoint colour text tokens temperature top_k top_p seed key go here".split()
    assert set(controls) <= reached


def test_nothing_comes_from_elsewhere_and_nothing_jumps(fresh: tuple[Browser, Live]):
    opened, live = fresh
    console = lambda: [entry["message"] for entry in opened.call("POST", "se/log", type="browser")]
    console()  # of the tests before
    layout = """return ["editor", "others", "go", "tokens"].map(id => {
        const box = document.getElementById(id).getBoundingClientRect();
        return [box.x, box.y, box.width, box.height];
    })"""
    before = opened.run(layout)
    opened.run("say('a long error '.repeat(30), true)")
    assert opened.run(layout) == before
    opened.keys(CONTROL, ENTER)
    generated(opened)
    opened.point(*opened.run(MIDDLE, 3))
    assert opened.run(layout) == before
    found = opened.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert found and all(name.startswith(live.url) for name in found)
    # The policy forbids scripts of a sample's, should one ever get into the page.
    script = "const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
    opened.run(f"{script} document.body.append(s)")
    assert opened.run("return window.bad") is None
    assert [p for p in console() if "Content Security Policy" not in p and "[DOM]" not in p] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_is_readable_in_both_schemes(fresh: tuple[Browser, Live], scheme: str):
    """A contrast of 4.5 (WCAG AA) of the text on the strongest colour of surprise."""
    opened, _ = fresh
    opened.run("document.documentElement.style.colorScheme = arguments[0]", scheme)
    colour = """
    const probe = document.createElement("span");
    probe.style.background = arguments[0];
    document.body.append(probe);
    const context = document.createElement("canvas").getContext("2d");
    for (const layer of arguments[1]) {
        probe.style.background = layer;
        context.fillStyle = getComputedStyle(probe).backgroundColor;
        context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    """
    strongest = "color-mix(in srgb, var(--surprise) 55%, transparent)"

    def luminance(*layers: str) -> float:
        parts = [c / 255 for c in opened.run(colour, layers[0], layers)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for ink, *layers in (
        ("var(--ink)", "var(--box)", strongest),
        ("var(--ink)", "var(--box)"),
        ("var(--dim)", "var(--page)"),
    ):
        low, high = sorted((luminance(ink), luminance(*layers)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, layers)
