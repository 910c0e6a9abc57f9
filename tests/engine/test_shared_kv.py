"""Layers that keep no KV and read that of an earlier layer: nothing of theirs is stored, moved or chosen, whatever the tier.

What happens to the KV that they read is shown with that of layers with a window, in test_windows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.distill.target import Target
from specontext.errors import ModelError
from specontext.kernels import dispatch
from specontext.kv.staging import DenseRead, Staging
from specontext.layer_sizes import Place, Window
from specontext.locations import read_config, shape_of
from specontext.memory.facts import facts_of_config
from specontext.memory.speed import Bandwidths, decode_floor
from specontext.model_shape import ModelShape
from specontext.models.loading import load_model
from tests.conftest import family_config
from tests.engine.test_equality import check_idle
from tests.engine.test_graph_safety import SeveralStreams

ONE = "shared"
NEAR, FAR = "sliding_attention", "full_attention"
Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Expected = Callable[..., list[list[int]]]


def test_readers_have_the_place_of_their_owner() -> None:
    shape = ModelShape.from_config(family_config(ONE, 900))
    window = Window(10)
    assert (shape.layers, shape.depth, shape.windowed, shape.readers) == (3, 8, (window, window), ((5, 3), (6, 4), (7, 4)))
    near, far = Place(1, window), Place(2, None)
    assert shape.places == {
        **{0: Place(0, window), 1: Place(0, None), 2: Place(1, None), 3: near, 4: far},
        **{5: near._replace(stored=True), 6: far._replace(stored=True), 7: far._replace(stored=True)},
    }
    assert shape.full == (1, 2, 4) and shape.read_order == (0, 1, 2, 2, 2) and shape.window_read_order == (0, 1, 1)
    long = ModelShape.from_config(family_config(ONE, 900, sliding_window=600, global_head_dim=16))
    assert not long.windows and long.layers == 5, "a window as long as the context is none, and is read by its own kind"
    assert long.read_order == (0, 1, 2, 3, 4, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"num_kv_shared_layers": 8},
            "layer 0 uses the keys and values of a sliding_attention layer before layer 0, and there is",
        ),
        ({"num_kv_shared_layers": 7}, "layer 1 uses the keys and values of a full_attention layer before layer 1, and there is"),
        ({"num_kv_shared_layers": 9}, "uses the keys and values of"),
    ],
)
def test_layers_whose_kind_keeps_no_kv_are_refused_by_name(changes: dict[str, Any], why: str) -> None:
    config = family_config(ONE, 900)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(AttributeError, match=why):
        ModelShape.from_config(config)


def test_a_model_that_reads_another_layer_than_its_config_says_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.model_shape.readers_of", lambda _: ((5, 3), (6, 4), (7, 2)))
    with pytest.raises(ModelError, match="a layer that should use the keys and values of layer 2, by its config, has others"):
        load_model(checkpoint(ONE), dtype="auto", device=torch.device("cpu"))


def test_only_owners_take_memory_and_are_counted(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm(ONE, "full", offload_layers=2, max_num_seqs=2)
    parts, row = llm.engine.parts, 2 * 32 * 4 * 2  # heads, width, bytes, key and value
    assert parts.plan.kv.layers == 3 and parts.plan.kv.resident_token == row and llm.shape.kv_bytes_per_token == 3 * row
    rings = parts.kv.rings
    assert rings is not None and rings.num_bytes == 2 * 3 * rings.entries * 2 * 2 * 16 * 4, "two layers, two seats and one"
    (output,) = llm.generate(prompts[2:3], greedy(4))
    stats = output.stats
    assert stats["bytes_full_per_step"] == sum(3 * row * (83 + step) for step in (1, 2, 3)) / 3
    assert stats["bytes_loaded_per_step"] == pytest.approx(stats["bytes_full_per_step"] * 2 / 3)  # type: ignore[operator]
    assert stats["tokens_read_per_step"] == pytest.approx(85)
    facts = facts_of_config("it", read_config(llm.engine.loaded.name))
    assert facts.parameters == llm.engine.loaded.parameters
    assert facts.lookup_parameters == llm.shape.vocab_size * (64 + 8 * 8), "of tables of embeddings a step reads a row"


def test_a_floor_knows_how_often_kv_is_read(checkpoint: Callable[[str], Path]) -> None:
    facts = facts_of_config("it", read_config(checkpoint(ONE)))
    speed = Bandwidths(1e9, 1e9)
    options: dict[str, Any] = {"requests": 1, "offloaded": 0, "budget": 64, "overlap": 0.5}
    short, long = (decode_floor(facts, speed, length=length, **options).device_bytes for length in (32, 64))
    keys = 32 * facts.key_bytes_per_token
    assert long - short - keys == 32 * 5 * facts.shape.kv_heads * facts.shape.row_bytes


def test_recall_is_the_mean_of_the_layers_that_read_the_same_kv(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(ONE, budget=12, measure_recall=True)
    seen: dict[int, list[float]] = {}
    meter = llm.engine.parts.meter
    record = meter.recall

    def watch(layer: int, seats: torch.Tensor, share: torch.Tensor) -> None:
        seen.setdefault(layer, []).append(float(share))
        record(layer, seats, share)

    monkeypatch.setattr(meter, "recall", watch)
    (output,) = llm.generate(prompts[2:3], greedy(4))
    assert [len(seen[layer]) for layer in range(3)] == [3, 3, 9]
    means = [sum(shares) / len(shares) for _, shares in sorted(seen.items())]
    assert output.stats["attention_recall_by_layer"] == pytest.approx(means)
    assert len({round(share, 6) for share in seen[2]}) == 9, "each has queries of its own"


@pytest.mark.slow
def test_methods_that_foresee_look_at_every_layer_that_reads(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(ONE, "shared-oracle", budget=12, offload_layers=2, methods=["full", "speculative"])
    outputs = llm.generate(prompts, [greedy(), greedy(method="full"), greedy(method="speculative"), greedy()])
    assert outputs[1].token_ids == expected(ONE)[1]
    whole = make_llm(ONE, "shared-oracle", budget=110, offload_layers=2)
    assert [output.token_ids for output in whole.generate(prompts, greedy())] == expected(ONE)
    check_idle(llm)


def test_a_teacher_shows_layers_that_read_the_same_kv_together(checkpoint: Callable[[str], Path]) -> None:
    loaded = load_model(checkpoint(ONE), dtype="auto", device=torch.device("cpu"))
    ids, rows = torch.arange(4, 44)[None], torch.tensor([[39, 20]])
    shown: dict[int, torch.Tensor] = {}
    target = Target(loaded.model, ())
    seen = target.observe(ids, rows, lambda layer, weights: shown.update({layer: weights}), keep=True)
    assert [shown[layer].shape for layer in range(3)] == [(1, 4, 2, 40), (1, 4, 2, 40), (1, 12, 2, 40)]
    assert len(seen.stored) == 3 and len(seen.windowed) == 2
    right = load_reference(checkpoint(ONE))(ids, output_attentions=True, use_cache=False).attentions
    of_heads = torch.stack([right[layer][:, :, rows[0]] for layer in (4, 6, 7)], 1)  # [1, readers, Hq, Q, S]
    by_group = of_heads.unflatten(2, (2, 2)).transpose(1, 2).flatten(1, 3)
    torch.testing.assert_close(shown[2], by_group, atol=1e-4, rtol=1e-4)


def load_reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def test_tiles_come_in_the_order_in_which_layers_read(make_llm: MakeLLM) -> None:
    """A tile that is read again is on its way once more, and nothing is fetched out of turn."""
    llm = make_llm(ONE, "full", offload_layers=2)
    kv = llm.engine.parts.kv
    kv.transfers.run_on(SeveralStreams())
    kv.open(0, 40)
    read = DenseRead(torch.zeros(1, dtype=torch.int64), 40, 16)
    staging, fetched = Staging(kv.transfers, [read], kv.read_order), []
    fetch = staging._fetch
    staging._fetch = lambda at: (fetched.append(at), fetch(at))[1]  # type: ignore[method-assign, assignment, func-returns-value]
    for layer in (1, 2, 2, 2):
        assert [(tile.start, tile.stop) for tile in staging.tiles(layer, read)] == [(0, 16), (16, 32), (32, 40)]
    assert fetched == list(range(1, 13)), "the first was on its way from the beginning"
    kv.close(0)


def test_ids_that_a_table_of_layers_lacks_read_its_first_row(
    write_family: Callable[..., Path], prompts: Prompts, greedy: Greedy
) -> None:
    folder = write_family(ONE, vocab_size_per_layer_input=1000)
    llm = LLM(folder, config=SpeContextConfig(method="full"), device="cpu")
    decoder = llm.engine.loaded.model.get_decoder()
    ids = torch.tensor([[5, 1200, 999, 1838]])
    found = decoder.embed_tokens_per_layer(ids)
    torch.testing.assert_close(found, decoder.embed_tokens_per_layer(torch.tensor([[5, 0, 999, 0]])), atol=0, rtol=0)
    assert len(llm.generate([[7, 1500, 1838]], greedy(4))[0].token_ids) == 4


def test_a_shape_without_readers_is_as_it_was(checkpoint: Callable[[str], Path]) -> None:
    shape = shape_of(checkpoint("windows"))
    assert shape.full == (1, 3, 4) and shape.read_order == (0, 1, 2) and not any(p.stored for p in shape.places.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "speculative", "oracle"])
def test_kernels_and_streams_of_a_gpu_change_nothing(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter: rows that are out of reach come through staging, some of them several times."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    llm = make_llm(ONE, method, budget=110, offload_layers=2, max_num_batched_tokens=24)
    llm.engine.parts.kv.transfers.run_on(SeveralStreams())
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    outputs = llm.generate([prompts[3], prompts[1][:28]], greedy(3))
    monkeypatch.delenv(dispatch.VARIABLE)
    assert outputs[0].token_ids == expected(ONE)[3][:3]
    plain = make_llm(ONE, "full", offload_layers=0)
    assert outputs[1].token_ids == plain.generate([prompts[1][:28]], greedy(3))[0].token_ids
