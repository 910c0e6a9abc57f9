"""generate() of an enabled model: the tokens of `LLM`, whatever generate() is asked for; refused in words, or as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache, TextIteratorStreamer, pipeline
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

import specontext
from specontext import LLM, SpeContextConfig, SpeContextError
from specontext.errors import ConfigError, EngineClosedError, HeadError, ModelError, RequestError
from specontext.integrations.hf_engine import CACHE
from specontext.retrieval.registry import METHODS

PAD, END = 1, 1
PAGE = 16 * 2 * 2 * 24 * 4  # bytes of a page of the family 'llama'
Load = Callable[..., PreTrainedModel]
Prompts = list[list[int]]


@pytest.fixture
def load(checkpoint: Callable[[str], Path]) -> Load:
    def make(family: str = "llama", **options: Any) -> PreTrainedModel:
        made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32, **options)
        return made

    return make


def settings(method: str = "speculative", **changes: Any) -> SpeContextConfig:
    return SpeContextConfig(method=method, **{"budget": 12, "sink": 2, "recent": 4} | changes)


def padded(prompts: Prompts) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def written(model: PreTrainedModel, prompts: Prompts, count: int = 10, **options: Any) -> list[list[int]]:
    """Tokens that generate() writes after each prompt of a batch padded on the left."""
    given = padded(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | options
    output = model.generate(**given, max_new_tokens=count, **options)
    return output[:, given["input_ids"].shape[1] :].tolist()


def of_llm(llm: LLM, prompts: Prompts, greedy: Any, count: int = 10) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, greedy(count))]


# Tokens ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "offload"),
    [
        ("llama", "speculative", None),
        ("bands", "speculative", -1),
        pytest.param("qwen3", "speculative", 2, marks=pytest.mark.slow),
        pytest.param("qwen2", "quest", -1, marks=pytest.mark.slow),
        ("mistral", "snapkv", None),
        pytest.param("llama", "streaming", 1, marks=pytest.mark.slow),
        ("llama", "full", None),
    ],
)
def test_tokens_are_those_of_llm(
    load: Load, make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any, family: str, method: str, offload: int | None
) -> None:
    want = of_llm(make_llm(family, method, budget=12, offload_layers=offload), prompts, greedy)
    model = load(family)
    enabled = specontext.enable(model, config=settings(method, offload_layers=offload), max_num_batched_tokens=32)
    assert written(model, prompts) == want
    assert [written(model, [prompt])[0] for prompt in prompts[:2]] == want[:2]
    [stats] = [one for one in enabled.statistics if one is not None]
    assert stats["method"] == method and stats["completion_tokens"] == 10 and stats["prompt_tokens"] == len(prompts[1])
    if method != "full":
        assert 0 < stats["tokens_read_per_step"] <= 12
    if offload == -1:
        assert stats["bytes_loaded_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_so_they_are_with_every_method(
    load: Load, make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any, method: str
) -> None:
    want = of_llm(make_llm("llama", method, budget=12, offload_layers=1), prompts, greedy, 10)
    model = load()
    specontext.enable(model, config=settings(method, offload_layers=1))
    assert written(model, prompts) == want


@pytest.mark.slow
def test_a_batch_that_has_no_room_takes_turns(load: Load, make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any) -> None:
    """Rows wait for each other at every token; those that are ahead make room, on the host and where that is full too."""
    want = of_llm(make_llm("llama", budget=12), prompts, greedy, 20)
    model = load()
    specontext.enable(model, config=settings(), gpu_memory=14 * PAGE, host_memory=60 * PAGE, max_num_seqs=4)
    assert written(model, prompts, 20) == want
    everything = of_llm(make_llm("llama", "full"), prompts, greedy, 20)
    config = settings("full", offload_layers=0)
    for host in (20, 60):
        enabled = specontext.enable(model, config=config, gpu_memory=26 * PAGE, host_memory=host * PAGE)
        assert written(model, prompts, 20) == everything
        assert enabled.engine.scheduler.preemptions > 20, "there is room for all"
        enabled.engine.check_integrity()
        assert not enabled.engine.has_work


def test_sampling_is_the_library_s(load: Load, prompts: Prompts) -> None:
    model, options = load(), {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}

    def sampled(**more: Any) -> list[list[int]]:
        torch.manual_seed(3)
        return written(model, prompts, **options | more)

    plain, several = sampled(), sampled(num_return_sequences=3)
    specontext.enable(model, config=settings(budget=400))
    assert sampled() == plain
    assert sampled(num_return_sequences=3) == several
    specontext.enable(model, config=settings())
    assert sampled() != plain


def test_processors_and_criteria_are_asked_and_scores_returned(load: Load, prompts: Prompts) -> None:
    model = load()
    seen: list[int] = []

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 100:] = -torch.inf  # in place, as many do
        return scores

    def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 90] * len(ids))

    def run() -> Any:
        options = {"logits_processor": LogitsProcessorList([forbid]), "stopping_criteria": StoppingCriteriaList([enough])}
        more: dict[str, Any] = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**padded(prompts), max_new_tokens=30, do_sample=False, pad_token_id=PAD, **options, **more)

    plain = run()
    enabled = specontext.enable(model, config=settings(budget=400))
    ours = run()
    assert torch.equal(ours.sequences, plain.sequences) and len(seen) == 2 * len(plain.scores)
    for mine, theirs in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert not enabled.engine.has_work, "the result keeps its rows alive"
    with pytest.raises(RequestError, match="went with its call"):
        model(input_ids=ours.sequences[:, -1:], **{CACHE: ours[CACHE]})


def test_rows_that_end_are_padded_and_computed_no_further(load: Load, prompts: Prompts) -> None:
    model = load()
    free = written(model, prompts, 20)
    end = free[1][5]
    plain = written(model, prompts, 20, eos_token_id=[end, free[2][9]])
    enabled = specontext.enable(model, config=settings(budget=400))
    assert written(model, prompts, 20, eos_token_id=[end, free[2][9]]) == plain
    counts = [one["completion_tokens"] for one in enabled.statistics if one is not None]
    assert counts == [row.index(PAD) if PAD in row[6:] else 20 for row in plain] and min(counts) < 20


def test_streamers_get_tokens_as_they_come(load: Load, prompts: Prompts, tokenizer: Any) -> None:
    model = load()
    specontext.enable(model, config=settings())
    want = tokenizer.decode(written(model, [prompts[1]])[0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(torch.tensor([prompts[1]]),), kwargs=options)
    thread.start()
    assert "".join(streamer) == want
    thread.join()


def test_calls_in_several_threads_share_the_engine(load: Load, prompts: Prompts) -> None:
    model = load()
    specontext.enable(model, config=settings(), max_num_seqs=2)
    want = [written(model, [prompt])[0] for prompt in prompts]
    got: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda number=number: got.update({number: written(model, [prompts[number]])[0]}))
        for number in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(prompts))] == want


def test_pipelines_and_chats(load: Load, tokenizer: Any) -> None:
    model, batched = load(), copy.deepcopy(tokenizer)
    batched.padding_side = "left"
    messages = [{"role": "user", "content": "where is the blue key? " * 20}]
    texts = ["one two three " * 12, "the key is in the box"]

    def run() -> Any:
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        pipe = pipeline("text-generation", model=model, tokenizer=batched, device="cpu")
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return pipe(texts, batch_size=2, **options), pipe(messages, **options), model.generate(**asked, **options).tolist()

    plain = run()
    enabled = specontext.enable(model, config=settings(budget=300))
    assert run() == plain and enabled.statistics[0]
    with pytest.raises(ModelError, match=r"give a pipeline's \.model"):
        specontext.enable(pipeline("text-generation", model=model, tokenizer=tokenizer))  # type: ignore[arg-type]


def test_known_prompts_are_kept_where_that_is_asked_for(load: Load, prompts: Prompts) -> None:
    model = load()
    enabled = specontext.enable(model, config=settings())
    first = written(model, [prompts[2]])
    assert written(model, [prompts[2]]) == first and enabled.statistics[0]["cached_tokens"] == 0
    enabled = specontext.enable(model, config=settings(), enable_prefix_caching=True)
    assert written(model, [prompts[2]]) == written(model, [prompts[2]]) == first
    assert enabled.statistics[0]["cached_tokens"] == 80


def test_an_output_ends_with_the_longest_context(
    load: Load, make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any, caplog: Any
) -> None:
    model = load()
    want = of_llm(make_llm("llama", budget=12, max_model_len=90), [prompts[2]], greedy, 30)
    specontext.enable(model, config=settings(), max_model_len=90)
    assert written(model, [prompts[2]], 30) == want and len(want[0]) == 7
    assert "outputs end there" in caplog.text
    with pytest.raises(RequestError, match="83 tokens and the model's maximum is 40"):
        specontext.enable(model, config=settings(), max_model_len=40)
        written(model, [prompts[2]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are captured on a GPU only")
def test_on_a_gpu_steps_are_captured(load: Load, make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any) -> None:
    memory: dict[str, Any] = {"gpu_memory": 1 << 30, "host_memory": 1 << 26}
    want = of_llm(make_llm("llama", budget=12, offload_layers=2, device="cuda", **memory), prompts, greedy, 24)
    model = load().to("cuda")
    enabled = specontext.enable(model, config=settings(offload_layers=2), **memory)
    ids = {name: tensor.cuda() for name, tensor in padded(prompts).items()}
    for _ in range(3):  # a size of batch is captured once it recurs
        output = model.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=PAD)
        assert output[:, ids["input_ids"].shape[1] :].tolist() == want
    assert enabled.statistics[0] is not None and enabled.statistics[0]["captured_steps"]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    negated = model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    assert not torch.equal(negated, output[:, : negated.shape[1]])


# One model, and nothing else ---------------------------------------------------------------------------------------------------


def test_disable_restores_the_model(load: Load, prompts: Prompts, checkpoint: Callable[[str], Path]) -> None:
    model = load(attn_implementation="eager")
    before, inside = dict(vars(model)), [dict(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    plain = written(model, prompts)
    specontext.enable(model, config=settings())
    assert written(model, prompts) != plain
    specontext.disable(model)
    assert written(model, prompts) == plain
    assert vars(model) == before and [dict(vars(module)) for module in model.modules()] == inside
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.config._attn_implementation == "eager"
    specontext.disable(model)  # changes nothing


def test_a_forward_pass_of_the_owner_s_is_what_it_was(load: Load, prompts: Prompts) -> None:
    model, ids = load(), torch.tensor([prompts[1]])
    plain = model(ids, labels=ids)
    enabled = specontext.enable(model, config=settings())
    written(model, prompts)
    for _ in range(2):
        ours = model(ids, labels=ids)
        assert torch.equal(ours.logits, plain.logits) and torch.equal(ours.loss, plain.loss)
        ours.loss.backward()
        assert model.get_input_embeddings().weight.grad is not None
    taps = enabled.engine.runner.taps
    assert taps is not None and not taps._taken, "hidden states of the owner's passes are kept"


def test_a_model_that_is_enabled_in_one_mode_generates_in_all(load: Load, prompts: Prompts) -> None:
    model, ids = load(), torch.tensor([prompts[1]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with torch.inference_mode():
        specontext.enable(model, None, settings("full", budget=None))
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with pytest.raises(RequestError, match="autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
        specontext.enable(model, None, settings("full", budget=None))


def test_models_do_not_disturb_each_other(load: Load, prompts: Prompts) -> None:
    one, other, plain = load(), load("qwen2"), load()
    want = [written(model, prompts) for model in (one, other)]
    specontext.enable(one, config=settings(budget=400))
    specontext.enable(other, config=settings())
    assert written(plain, prompts) == want[0] == written(one, prompts)
    sparse = written(other, prompts)
    assert sparse != want[1]
    specontext.disable(one)
    assert written(other, prompts) == sparse and written(one, prompts) == want[0]
    copied = copy.deepcopy(other)
    assert written(copied, prompts) == want[1], "a copy is an ordinary model"
    assert written(other, prompts) == sparse
    specontext.enable(copied, config=settings())
    assert written(copied, prompts) == sparse == written(other, prompts)


def test_a_model_that_is_dropped_is_freed_with_its_engine(load: Load, prompts: Prompts) -> None:
    model = load()
    rows = weakref.ref(specontext.enable(model, config=settings()).engine.parts.kv.arena.rows)
    written(model, prompts)
    weight = weakref.ref(model.get_input_embeddings().weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert rows() is None and weight() is None
    finally:
        gc.enable()


def test_settings_can_be_changed_and_failures_leave_an_ordinary_model(load: Load, prompts: Prompts, tmp_path: Path) -> None:
    model = load()
    plain = written(model, prompts)
    first = specontext.enable(model, config=settings())
    sparse = written(model, prompts)
    specontext.enable(model, config=settings(budget=400))
    assert first.closed and written(model, prompts) == plain
    with pytest.raises(HeadError, match="nowhere"):
        specontext.enable(model, retrieval_head=tmp_path / "nowhere")
    assert written(model, prompts) == plain and not any("specontext" in name for m in model.modules() for name in vars(m))
    with pytest.raises(ConfigError, match="unknown option dtype: enable takes"):
        specontext.enable(model, dtype="bfloat16")
    specontext.enable(model, config=settings())
    assert written(model, prompts) == sparse


def test_weights_that_were_trained_in_place_are_read_and_moved_ones_refused(load: Load, prompts: Prompts) -> None:
    model = load()
    specontext.enable(model, config=settings(budget=400))
    written(model, prompts)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    ours = written(model, prompts)
    specontext.disable(model)
    assert ours == written(model, prompts)
    specontext.enable(model, config=settings())
    model.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"moved or exchanged after specontext\.enable: call it again"):
        written(model, prompts)


def test_rope_that_follows_the_length_is_fixed_for_the_engine_alone(
    write_family: Callable[..., Path], make_llm: Callable[..., LLM], prompts: Prompts, greedy: Any
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = write_family("llama", rope_parameters=rope, max_position_embeddings=128)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    far = torch.arange(4, 304)[None]
    plain = written(model, prompts), model(far).logits
    config = settings("full")
    want = of_llm(LLM(folder, config=config, device="cpu"), prompts, greedy, 10)
    specontext.enable(model, config=config)
    for _ in range(2):
        assert torch.equal(model(far).logits, plain[1])  # longer than what the engine serves
        assert written(model, prompts) == want == plain[0]  # whatever the library has made of the angles for that
    specontext.disable(model)
    assert torch.equal(model(far).logits, plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(load: Load, prompts: Prompts, dtype: torch.dtype) -> None:
    model = load().to(dtype)
    enabled = specontext.enable(model, config=settings(offload_layers=-1))
    assert [len(row) for row in written(model, prompts)] == [10] * 4
    assert enabled.engine.parts.kv.arena.rows.dtype == dtype


def test_adapters_that_are_not_merged_can_be_exchanged(load: Load, prompts: Prompts) -> None:
    peft = pytest.importorskip("peft", reason="its adapters run inside of a model")
    settings_of = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(load(), peft.LoraConfig(**settings_of)).eval()
    with adapted.disable_adapter():
        plain = written(adapted, prompts)
    right = written(adapted, prompts)
    with pytest.raises(ModelError, match="get_base_model"):
        specontext.enable(adapted)
    enabled = specontext.enable(adapted.get_base_model(), config=settings(budget=400))
    assert enabled.engine.config.enforce_eager
    assert written(adapted, prompts) == right != plain
    with adapted.disable_adapter():
        assert written(adapted, prompts) == plain


# Refused in words --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search takes back"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample takes back"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static": ({"cache_implementation": "static"}, "cache_implementation 'static'"),
    "paged": ({"cache_implementation": "paged"}, "continuous batching"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "attention and hidden states"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "attention and hidden states"),
    "guidance": ({"guidance_scale": 1.5}, "guidance"),
    "others' code": ({"custom_generate": "somebody/something", "trust_remote_code": True}, "generation code of others"),
    "dola": ({"dola_layers": "low", "trust_remote_code": True}, "generation code of others"),
    "positions": ({"position_ids": torch.arange(5, 52)[None]}, "position_ids do not count"),
    "right": ({"attention_mask": torch.tensor([[1] * 40 + [0] * 7])}, "pad on the left"),
    "hole": ({"attention_mask": torch.tensor([[1] * 20 + [0] * 7 + [1] * 20])}, "pad on the left"),
    "nothing": ({"attention_mask": torch.tensor([[0] * 47])}, "pad on the left"),
    "own cache": ({CACHE: DynamicCache()}, "the engine keeps KV itself"),
    "many": ({"num_return_sequences": 17, "do_sample": True}, "a batch of 17 is more than the 16 .* raise max_num_seqs"),
}


@pytest.fixture(scope="module")
def enabled_model(checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    specontext.enable(model, config=settings())
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_words(enabled_model: PreTrainedModel, prompts: Prompts, case: str) -> None:
    options, words = REFUSED[case]
    config = enabled_model.generation_config.to_dict()
    with pytest.raises(RequestError, match=words):
        enabled_model.generate(torch.tensor([prompts[1]]), **{"max_new_tokens": 4, "pad_token_id": PAD} | options)
    assert len(written(enabled_model, [prompts[1]], 4)[0]) == 4, "the next call works"
    assert enabled_model.generation_config.to_dict() == config


def test_stop_strings_are_the_library_s(load: Load, prompts: Prompts, tokenizer: Any) -> None:
    model = load()
    first = tokenizer.decode(written(model, prompts[:1], 3)[0][:2])
    options = {"stop_strings": [first], "tokenizer": tokenizer}
    expected = written(model, prompts[:1], **options)
    specontext.enable(model, None, settings("full"))
    assert written(model, prompts[:1], **options) == expected and len(expected[0]) < 10


def test_inputs_of_another_shape(enabled_model: PreTrainedModel, prompts: Prompts) -> None:
    ids = torch.tensor(prompts[:1])
    with pytest.raises(RequestError, match="give one or more tokens for each row"):
        enabled_model.generate(ids[:, :0], max_new_tokens=2)
    with pytest.raises(RequestError, match=r"position_ids|one number for each token"):
        enabled_model.generate(ids, attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_more_that_is_refused(enabled_model: PreTrainedModel, load: Load, prompts: Prompts) -> None:
    ids, plain = torch.tensor([prompts[1]]), load()
    with pytest.raises(RequestError, match="assisted generation"):
        enabled_model.generate(ids, assistant_model=plain, max_new_tokens=4)
    with pytest.raises(RequestError, match="assisted generation"):
        plain.generate(ids, assistant_model=enabled_model, max_new_tokens=4)
    with pytest.raises(RequestError, match="a retrieval head reads tokens"):
        enabled_model.generate(inputs_embeds=enabled_model.get_input_embeddings()(ids), max_new_tokens=4)
    with pytest.raises(RequestError, match="is not a token id"):
        enabled_model.generate(torch.full((1, 5), 10**6), max_new_tokens=4)
    with pytest.raises(RequestError, match="autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
        enabled_model.generate(ids, max_new_tokens=4)
    with pytest.raises(SpeContextError, match=r"disable\(model\) first"):
        pickle.dumps(specontext.enable(plain, config=settings("streaming")))
    with pytest.raises(ModelError, match="got Linear"):
        specontext.enable(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"call model.eval\(\) first"):
        specontext.enable(plain.train())
    assert len(written(enabled_model, [prompts[1]], 4)[0]) == 4


def test_a_custom_loop_is_right_or_refused(enabled_model: PreTrainedModel, prompts: Prompts) -> None:
    def twice(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        given = {name: kwargs[name] for name in (CACHE, "attention_mask") if name in kwargs}
        model(input_ids=input_ids, **given)
        model(input_ids=input_ids, **given)

    def reordered(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        kwargs[CACHE].reorder_cache(torch.tensor([0]))

    for loop, words in ((twice, "do not go on with 1 rows"), (reordered, "cannot be copied, cut or exchanged")):
        with pytest.raises(RequestError, match=words):
            enabled_model.generate(torch.tensor([prompts[1]]), custom_generate=loop, max_new_tokens=4)


def test_chunks_that_were_asked_for_are_the_engine_s(enabled_model: PreTrainedModel, prompts: Prompts) -> None:
    want = written(enabled_model, [prompts[2]])
    assert written(enabled_model, [prompts[2]], prefill_chunk_size=8) == want


def test_disabling_in_the_middle_is_told(load: Load, prompts: Prompts) -> None:
    model = load()
    specontext.enable(model, config=settings())

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        specontext.disable(model)
        return torch.tensor([False])

    with pytest.raises((EngineClosedError, RequestError)):
        written(model, [prompts[1]], stopping_criteria=StoppingCriteriaList([stop]))
    assert len(written(model, [prompts[1]], 3)[0]) == 3


def test_a_static_cache_given_by_the_caller_is_refused(enabled_model: PreTrainedModel, prompts: Prompts) -> None:
    cache = StaticCache(config=enabled_model.config, max_cache_len=64)
    with pytest.raises(RequestError, match="the engine keeps KV itself"):
        enabled_model.generate(torch.tensor([prompts[1]]), max_new_tokens=4, **{CACHE: cache})
