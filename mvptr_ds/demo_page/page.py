"""The page itself: what stands where, and which answer goes where. Nothing in it asks another host for anything."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

from mvptr_ds.corpus.preview.render import readable, shortened
from mvptr_ds.demo_page import drawing
from mvptr_ds.demo_page.answers import MAX_SENTENCE_CHARS, MAX_UPLOAD_BYTES, Answers, checked
from mvptr_ds.errors import USER_ERRORS, DataError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
FIRST_PORT = 7860  # and the hundred behind it, the first that is free
_SUFFIXES = [".jpg", ".jpeg", ".png", ".webp"]
_STATES = {"uni-modal states": "uni", "cross states": "cross"}
# a browser that heeds it loads nothing from elsewhere, whatever a part of the page or a caption asks for
_POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'; "
    b"frame-ancestors 'self'"
)


def import_gradio() -> Any:
    """Returns the package that makes the page, its reports to its maker switched off.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'mvptr_ds[demo]'") from error
    return gradio


@contextmanager
def served(answers: Answers, title: str, port: int | None) -> Iterator[str]:
    """Serves the page on this machine alone, and yields its address. Uploads are deleted at the end.

    Raises:
        ValueError: gradio is not installed.
        OSError: the port is taken.
    """
    gradio = import_gradio()
    with tempfile.TemporaryDirectory(prefix="mvptr-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is there
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST, "localhost")))
        page = build_page(answers, title)
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD_BYTES,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [_policy_middleware()]},
            theme=gradio.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),  # the default one asks a font server
            css=drawing.style(),
        )
        try:
            yield address
        finally:
            page.close(verbose=False)


def build_page(answers: Answers, title: str) -> Any:
    """Returns the page, `gradio.Blocks`, not yet served."""
    gr = import_gradio()
    options = {
        "api_visibility": "private",
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "minimal",
    }
    with gr.Blocks(title=shortened(readable(title), 80), analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(answers, title))
        with_tags = gr.Checkbox(True, label="Tags: the model reads the object tags of the regions", elem_id="tags")
        with gr.Tab("Search"):
            wanted = _textbox(gr, "A sentence", "search-text")
            find = gr.Button("Search", variant="primary", elem_id="search")
            hits = gr.HTML(elem_id="hits")
        with gr.Tab("One picture", elem_id="one-picture"), gr.Row():
            with gr.Column(scale=2):
                number = gr.Dropdown(_choices(answers), value=0, label="A held-out picture", elem_id="number")
                upload = gr.File(
                    label="or your own: JPEG, PNG or WebP",
                    file_types=_SUFFIXES,
                    type="filepath",
                    height=150,
                    elem_id="upload",
                )
                chosen = gr.HTML(elem_id="chosen")
            with gr.Column(scale=3):
                with gr.Tab("Ground phrases"):
                    sentence = _textbox(gr, "A sentence", "ground-text")
                    states = gr.Radio(list(_STATES), value=next(iter(_STATES)), label="Compare", elem_id="states")
                    ground = gr.Button("Ground", variant="primary", elem_id="ground")
                    grounded = gr.HTML(elem_id="grounded")
                with gr.Tab("Which is true?"):
                    first = _textbox(gr, "A caption", "first-text")
                    second = _textbox(gr, "The same with a swap", "second-text")
                    compare = gr.Button("Compare", variant="primary", elem_id="compare")
                    compared = gr.HTML(elem_id="compared")
                with gr.Tab("Fill a mask"):
                    masked = _textbox(gr, "A sentence with [MASK]", "mask-text")
                    fill = gr.Button("Fill", variant="primary", elem_id="fill")
                    filled = gr.HTML(elem_id="filled")
        picture, texts, answer = (
            [number, upload, with_tags],
            [sentence, first, second, masked],
            [grounded, compared, filled],
        )

        @_in_words
        def show_found(text: str, tags: bool) -> Markup:
            return drawing.search(answers.search(text, tags), answers.held_out)

        @_in_words
        def show_chosen(number: int | None, upload: str | None, tags: bool) -> Markup:
            return drawing.chosen(answers.picture(number, upload, tags))

        @_in_words
        def show_grounded(number: int | None, upload: str | None, tags: bool, text: str, states: str) -> Markup:
            seen = answers.picture(number, upload, tags)
            return drawing.grounding(seen, checked(text), answers.ground(seen, text, _STATES[states]))

        @_in_words
        def show_compared(number: int | None, upload: str | None, tags: bool, one: str, two: str) -> Markup:
            read_outs = answers.compare(answers.picture(number, upload, tags), one, two)
            return drawing.comparison(read_outs, checked(one), checked(two))

        @_in_words
        def show_filled(number: int | None, upload: str | None, tags: bool, text: str) -> Markup:
            return drawing.filled_masks(answers.fill(answers.picture(number, upload, tags), text))

        def propose(number: int | None) -> list[str]:
            captions = answers.held_out[number].captions if number is not None else ()
            caption = captions[0][:MAX_SENTENCE_CHARS] if captions else ""
            return [caption, caption, answers.swapped(caption), answers.masked(caption)] if caption else [""] * 4

        def on(events: list[Any], do: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
            # of events that come while one is answered, the last counts
            gr.on(events, do, inputs, outputs, trigger_mode="always_last", **options)

        on([find.click, wanted.submit], show_found, [wanted, with_tags], hits)
        on([ground.click, sentence.submit], show_grounded, [*picture, sentence, states], grounded)
        on([compare.click, first.submit, second.submit], show_compared, [*picture, first, second], compared)
        on([fill.click, masked.submit], show_filled, [*picture, masked], filled)
        # another picture: its captions are proposed, what was said of the last one goes, and an upload gives way
        on([number.select], lambda: (None, "", "", ""), [], [upload, *answer])
        on([number.select, page.load], propose, [number], texts)
        on([page.load, number.change, upload.change, with_tags.change], show_chosen, picture, chosen)
        on([upload.change, with_tags.change], lambda: ("", "", "", ""), [], [hits, *answer])
    return page


def _in_words(answer: Callable[..., Markup]) -> Callable[..., str]:
    """Returns an answer whose errors are messages in the page: no traceback, and no answer that is half of one."""

    @functools.wraps(answer)
    def in_words(*inputs: Any) -> str:
        try:
            return str(answer(*inputs))
        except USER_ERRORS as error:
            if not isinstance(error, DataError):
                logger.warning("a question could not be answered", exc_info=True)
            return str(drawing.message(str(error)))

    return in_words


def _heading(answers: Answers, title: str) -> str:
    num = len(answers.held_out)
    nothing = (
        "" if answers.has_pictures else " These shards hold features alone, no pictures: boxes stand on a plain sheet."
    )
    heading = Markup("<h2 class='mv-heading'>{}</h2><p class='mv-note'>{} held-out pictures.{}</p>").format(
        readable(title), num, nothing
    )
    return str(heading)


def _choices(answers: Answers) -> list[tuple[str, int]]:
    """Returns what the list of held-out pictures says, and the number of each."""
    return [
        (f"{number}: {shortened(readable(one.captions[0]), 40) if one.captions else 'no caption'}", number)
        for number, one in enumerate(answers.held_out)
    ]


def _textbox(gr: Any, label: str, name: str) -> Any:
    return gr.Textbox(label=label, elem_id=name, max_length=MAX_SENTENCE_CHARS, lines=1)


class _Policy:
    """Adds the policy to every answer of the server."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY)]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _policy_middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(_Policy)
