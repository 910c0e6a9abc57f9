"""The engine inside lm-eval: tasks run by its own evaluator, and log-likelihoods against Hugging Face."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from specontext import SamplingParams
from specontext.errors import ConfigError, RequestError, SpeContextError
from specontext.evaluation.token_counter import token_counter
from specontext.integrations.lm_eval import SpeContextLM, main
from specontext.tasks import sample_problems

GENERATE = """
include: {babi}
task: nano_retrieval
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
training_split: null
validation_split: null
doc_to_text: "{{{{prompt}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16}}
"""
CHOOSE = """
task: nano_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def requests(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def tasks(folder: Path) -> TaskManager:
    """A task that includes one of lm-eval's own definitions (babi) and one of multiple choice, both on local files."""
    problems = sample_problems("niah_single", length=160, seed=0, n=4, count_tokens=token_counter("nano"))
    rows = [{"prompt": one.prompt, "answer": one.answer, "choices": [one.answer, "000", "cold"]} for one in problems]
    data = folder / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    babi = Path(lm_eval.__file__).parent / "tasks" / "babi" / "babi.yaml"
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(text.format(babi=babi, data=data, cache=folder / "cache"))
    return TaskManager(include_path=folder, include_defaults=False)


@pytest.fixture(scope="module")
def nano() -> SpeContextLM:
    return SpeContextLM("nano", "speculative", budget=64, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> SpeContextLM:
    return SpeContextLM(str(checkpoint("llama")), "full", max_num_seqs=4, device="cpu")


def test_lm_eval_runs_its_tasks_by_name(tmp_path: Path) -> None:
    results = lm_eval.simple_evaluate(
        model="specontext",
        model_args="pretrained=nano,method=speculative,budget=64,device=cpu",
        tasks=["nano_retrieval", "nano_choice"],
        batch_size="auto",
        task_manager=tasks(tmp_path),
        bootstrap_iters=0,
    )
    assert results is not None
    assert results["results"]["nano_retrieval"]["exact_match,none"] == 1.0
    assert results["results"]["nano_choice"]["acc,none"] == 1.0
    said = results["config"]["specontext"]
    assert (said["method"], said["budget"]) == ("speculative", 64)
    assert 32 <= said["tokens_read_per_step"] <= 64 and said["selection_bytes_per_step"] > 0


def test_answers_are_those_of_the_engine(nano: SpeContextLM) -> None:
    problems = sample_problems("niah_single", length=200, seed=1, n=3, count_tokens=token_counter("nano"))
    options = {"until": ["."], "max_gen_toks": 10, "do_sample": False}
    answers = nano.generate_until(requests("generate_until", *((one.prompt, options) for one in problems)))
    params = SamplingParams(temperature=0.0, max_tokens=10, stop=["."])
    assert answers == [output.text for output in nano.llm.generate([one.prompt for one in problems], params)]
    assert any(answer in f" {one.answer}" for answer, one in zip(answers, problems, strict=True))


def test_the_method_is_the_one_that_was_named(checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    model = SpeContextLM(str(checkpoint("llama")), "quest-prompt", budget=48, offload_layers=0, device="cpu")
    model.generate_until(requests("generate_until", ("the red cat " * 40, {"until": [], "max_gen_toks": 4})))
    assert "log-likelihoods" not in caplog.text
    for _ in range(2):
        model.loglikelihood(requests("loglikelihood", ("the red cat", " sat")))
    assert caplog.text.count("log-likelihoods come from the dense prefill: they say nothing about the method quest-prompt") == 1
    (output,) = model.llm.generate("the red cat", SamplingParams(max_tokens=2, method="quest-prompt"))
    assert output.stats["method"] == "quest-prompt" == model.get_model_info()["specontext"]["method"]


def test_log_likelihoods_are_those_of_hugging_face(
    tiny: SpeContextLM, reference: Callable[[str], PreTrainedModel], tokenizer: Any
) -> None:
    pairs = [("the red cat", " sat on a mat"), ("", "a blue dog"), ("the cat ", "ran")]
    found = tiny.loglikelihood(requests("loglikelihood", *pairs))
    model = reference("llama")
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        whole = tiny.tok_encode(context + continuation) if context else [tokenizer.bos_token_id, *_plain(tokenizer, continuation)]
        known = len(tiny.tok_encode(context.rstrip())) if context else 1
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        rows = range(known - 1, len(whole) - 1)
        assert total == pytest.approx(sum(float(logprobs[i, whole[i + 1]]) for i in rows), abs=1e-3)
        assert greedy == all(int(logprobs[i].argmax()) == whole[i + 1] for i in rows)


def test_the_greedy_continuation_is_told(tiny: SpeContextLM, greedy: Callable[..., SamplingParams]) -> None:
    ids = tiny.tok_encode("the red cat")
    (output,) = tiny.llm.generate([ids], greedy(5))
    found = tiny._loglikelihood_tokens([(None, ids, output.token_ids), (None, ids, [*output.token_ids[:4], 9])])
    assert [is_greedy for _, is_greedy in found] == [True, output.token_ids[4] == 9]


def test_long_texts_are_scored_in_windows_that_predict_every_token_once(
    tiny: SpeContextLM, reference: Callable[[str], PreTrainedModel], tokenizer: Any
) -> None:
    text = "the red cat sat on a mat. " * 150
    ids = [tokenizer.bos_token_id, *_plain(tokenizer, text)]
    room = tiny.max_length - 2
    assert len(ids) > 2 * room
    expected, start = 0.0, 1
    while start < len(ids):
        stop = min(start + room, len(ids))
        window = ids[max(0, stop - 1 - room) : stop]
        logprobs = reference("llama")(torch.tensor([window])).logits[0].log_softmax(-1)
        offset = stop - len(window)
        expected += sum(float(logprobs[i - offset - 1, ids[i]]) for i in range(start, stop))
        start = stop
    (found,) = tiny.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(expected, rel=1e-5)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_prompts_and_answers_are_cut_to_the_model_s_length(tiny: SpeContextLM, caplog: pytest.LogCaptureFixture) -> None:
    long = "the red cat sat on a mat. " * 100
    ids, params, _ = tiny._request(long, {"until": [], "max_gen_toks": 20}, 0)
    assert len(ids) + params.max_tokens == tiny.max_length and params.max_tokens == 20
    assert ids == tiny.tok_encode(long)[-len(ids) :] and "loses its first" in caplog.text
    ids, params, _ = tiny._request("the red cat", {"max_gen_toks": 32768}, 0)
    assert len(ids) + params.max_tokens == tiny.max_length and "has room for" in caplog.text
    with pytest.raises(RequestError, match="has no room"):
        tiny._loglikelihood_tokens([(None, [5], [7] * 600)])


def test_generation_arguments(tiny: SpeContextLM) -> None:
    def params(**arguments: Any) -> SamplingParams:
        return tiny._request("the cat", arguments, 0)[1]

    assert params().temperature == 0.0 and params().max_tokens == 256
    assert params(do_sample=False, temperature=0.7).temperature == 0.0
    assert params(do_sample=True).temperature == 1.0
    assert params(temperature=0.7, top_p=0.9).top_p == 0.9
    assert params(until="x").stop == ("x",) and params(until=["", "y"]).stop == ("y",)
    assert params(max_new_tokens=7).max_tokens == 7 and params(num_beams=1).max_tokens == 256
    with pytest.raises(RequestError, match="no beam search"):
        params(num_beams=4)
    with pytest.raises(RequestError, match=r"generation argument penalty_alpha is not supported: give top_p"):
        params(penalty_alpha=0.6)


def test_repeats_that_are_sampled_differ(tiny: SpeContextLM) -> None:
    one = ("the red cat", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    first = tiny.generate_until(requests("generate_until", one, one, one))
    assert len(set(first)) == 3
    assert tiny.generate_until(requests("generate_until", one, one, one)) == first


def test_thinking_is_no_part_of_the_answer(checkpoint: Callable[[str], Path]) -> None:
    model = SpeContextLM(str(checkpoint("llama")), "full", think_end_token="</think>", device="cpu")
    assert model._request("the cat", {"until": ["\n"]}, 0)[1].stop == ()
    assert model._answer("first\nthis</think>\n\n42\nmore", ("\n",)) == "42"
    assert model._answer("42\nmore", ("\n",)) == "42"


def test_chat_templates(nano: SpeContextLM, tokenizer: Any) -> None:
    history = [{"role": "user", "content": "where is the cat?"}]
    text = nano.apply_chat_template(history)
    assert text == tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert nano.tok_encode(text).count(tokenizer.bos_token_id) == 1
    unfinished = nano.apply_chat_template([*history, {"role": "assistant", "content": "on the"}], add_generation_prompt=False)
    assert unfinished.endswith("on the") and nano.tokenizer_name
    template, nano.tokenizer.chat_template = nano.tokenizer.chat_template, None
    try:
        with pytest.raises(SpeContextError, match="no chat template"):
            nano.apply_chat_template(history)
    finally:
        nano.tokenizer.chat_template = template


def test_model_arguments(nano: SpeContextLM, tiny: SpeContextLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nano.llm.engine.config.max_num_seqs == 4 == tiny.llm.engine.config.max_num_seqs
    with pytest.raises(ConfigError, match="unknown model argument bugdet: choose among pretrained, method"):
        SpeContextLM("nano", bugdet=3)
    with pytest.raises(ConfigError, match="batch_size must be a number or 'auto'"):
        SpeContextLM("nano", batch_size="many")
    with pytest.raises(ConfigError, match="unknown method"):
        SpeContextLM("nano", "nosuch")


def test_model_arguments_go_before_lm_eval_s_defaults(checkpoint: Callable[[str], Path]) -> None:
    model = SpeContextLM.create_from_arg_string(
        f"pretrained={checkpoint('llama')},method=full,batch_size=3", {"batch_size": 1, "device": "cpu", "max_batch_size": None}
    )
    assert model.llm.engine.config.max_num_seqs == 3 and model.llm.engine.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_command_line_is_lm_eval_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tasks(tmp_path)
    monkeypatch.setattr(
        TaskManager.__init__, "__defaults__", (None, None, False, None)
    )  # no half a minute for lm-eval's own tasks
    arguments = ["--model", "specontext", "--tasks", "nano_choice", "--include_path", str(tmp_path), "--model_args"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments, "pretrained=nano,method=full"])
    assert main() == 0
    assert "nano_choice" in capsys.readouterr().out and "running on the CPU" in caplog.text
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments, "pretrained=./absent"])
    assert main() == 1
    assert "error: no checkpoint directory at" in capsys.readouterr().err
