"""`specontext generate`: one prompt, streamed text, and what it cost."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from specontext.checkpoints.files import user_path
from specontext.cli.options import Settings, with_settings
from specontext.cli.terminal import MODEL_HELP, UsageError, decoded, error_console, human_bytes, quiet_libraries
from specontext.core import RequestOutput
from specontext.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specontext import LLM


@with_settings()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="'-' reads the prompt from standard input.")] = None,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The prompt, taken as it is.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="UTF-8 file with the prompt; one newline at its end is left out."),
    ] = None,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="Retrieval head; 'auto' takes the checkpoint's own.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample from this many likeliest tokens; 0 is no limit.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the output; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    settings: Settings,
) -> None:
    """Generate text from one prompt: --prompt TEXT, --prompt-file FILE, or '-' for standard input.

    Text goes to standard output, settings and statistics go to standard error.
    """
    text = read_prompt(prompt, prompt_file, stdin)
    stop = [decoded(each, "--stop") for each in stop or ()]
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, ignore_eos=ignore_eos, max_tokens=max_tokens
    )
    llm = load_llm(model, retrieval_head, settings)
    given = chat_prompt(llm, text) if chat else text
    if as_json:
        [output] = llm.generate(given, params)
        print(json.dumps(as_object(output)))
        return
    output = print_stream(llm, given, params)
    error_console().print(escape(summary(output.stats)), style="dim")


def load_llm(model: str, retrieval_head: str, settings: Settings) -> LLM:
    """The engine for these settings; to stderr go the non-default ones, first, and at last how the retrieval head is set."""
    if settings.changed or retrieval_head != "auto":
        changed = settings.changed if retrieval_head == "auto" else {"retrieval_head": retrieval_head} | settings.changed
        listed = Settings(settings.config, settings.engine, changed).describe()
        error_console().print(escape(f"non-default options: {listed}"), style="dim")
    quiet_libraries()
    from specontext import LLM
    from specontext.engine.settled import describe_head

    llm = LLM(
        model, retrieval_head=None if retrieval_head == "none" else retrieval_head, config=settings.config, **settings.engine
    )
    parts = llm.engine.parts
    if parts.head is not None:
        error_console().print(escape(describe_head(parts.head, parts.max_tokens)), style="dim")
    return llm


def read_prompt(text: str | None, file: str | None, stdin: str | None) -> str:
    """The prompt from the one source that was named.

    Raises:
        UsageError: none or several sources, an unreadable or undecodable one, or an empty prompt.
    """
    if stdin not in (None, "-"):
        raise UsageError(f"unexpected argument '{stdin}': give the prompt as --prompt TEXT, --prompt-file FILE or '-'")
    if [text, file, stdin].count(None) != 2:
        raise UsageError("give exactly one prompt: --prompt TEXT, --prompt-file FILE, or '-' for standard input")
    text = _read_text(file if file is not None else "-") if text is None else decoded(text, "--prompt")
    if not text:
        raise UsageError("the prompt is empty: give at least one character")
    return text


def _read_text(file: str) -> str:
    name = "standard input" if file == "-" else file
    try:
        raw = sys.stdin.buffer.read() if file == "-" else user_path(file, UsageError).read_bytes()
        text = raw.decode("utf-8-sig")  # a byte order mark is not part of the text
    except OSError as error:
        raise UsageError(f"cannot read the prompt from {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: byte {error.start} cannot be decoded; convert it to UTF-8") from error
    for newline in ("\r\n", "\n"):
        if text.endswith(newline):
            return text.removesuffix(newline)
    return text


def chat_prompt(llm: LLM, text: str) -> list[int]:
    """The tokens of `text` as a user's message in the model's chat template.

    Raises:
        UsageError: the model has no chat template.
        ChatTemplateError: it does not take the message.
    """
    if not llm.tokenizer.chat_template:
        raise UsageError(
            "the model has no chat template, neither in chat_template.jinja nor in tokenizer_config.json beside its weights: "
            "download that file, leave out --chat, or give the template to the server (specontext serve --chat-template FILE)"
        )
    from specontext.models.chat_template import ChatTemplate

    prompt = ChatTemplate(llm.tokenizer).render([{"role": "user", "content": text}])
    return list(llm.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def print_stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    """Write the text to stdout as it comes; returns the finished output."""
    shown = 0
    output = None
    for output in llm.stream(prompt, params):
        sys.stdout.write(output.text[shown:])
        sys.stdout.flush()
        shown = len(output.text)
    assert output is not None
    if not output.text.endswith("\n"):
        print(flush=True)
    return output


def as_object(output: RequestOutput) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "stats": output.stats,
    }


def summary(stats: dict[str, Any]) -> str:
    """The statistics of one output in a line; what is undefined is left out."""

    def show(form: str, *names: str) -> list[str]:
        values = [stats.get(name) for name in names]
        return [] if None in values else [form.format(*values)]

    def size(name: str) -> str | None:
        return None if stats.get(name) is None else human_bytes(stats[name])

    sized = {name: size(f"{name}_per_step") for name in ("bytes_loaded", "selection_bytes", "bytes_full")}
    parts = show("{}, budget {}", "method", "budget") if stats.get("method") != "full" else ["full"]
    parts += show("{:,} + {:,} tokens", "prompt_tokens", "completion_tokens")
    parts += show("{:,.0f} KV entries read a step", "tokens_read_per_step")
    parts += [
        f"loaded {sized['bytes_loaded']}, selection read {sized['selection_bytes']}, dense {sized['bytes_full']} a step"
    ] * (None not in sized.values())
    parts += show("overlap {:.1%}", "overlap") + show("hit rate {:.1%}", "hit_rate") + show("recall {:.1%}", "attention_recall")
    parts += show("first token {:.2f} s", "ttft_s")
    if stats.get("tpot_s") is not None:
        parts.append(f"{stats['tpot_s'] * 1000:.1f} ms a token")
    return " | ".join(parts + show("weights {}", "weights"))
