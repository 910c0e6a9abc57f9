"""Where quantised weights come from: a quantised checkpoint, plain weights that are rounded, or nothing but a form and chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from specontext.checkpoints.quantization import ADVICE
from specontext.checkpoints.reading import metadata_of, tensor_reader
from specontext.checkpoints.weights import PLAIN, StoredTensor
from specontext.errors import ModelError
from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.locations import one_sentence
from specontext.models.experts import Experts, stored_parts
from specontext.quantization.made import FORMS, Form, quantized, random_matrix
from specontext.quantization.parts import joined
from specontext.quantization.schemes import Scheme
from specontext.quantization.stored import read_matrix, stored_matrices
from specontext.quantization.torchao import torchao_tensors

DEVIATION = 0.02  # of random weights


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        modules: names of those whose matrix is quantised.
        matrix: reads one of them; a tensor where it is written out in any case.
        plain: all other tensors, by name.
        turned: the format has the matrices of all models alike, also of those that keep them the other way round, as GPT-2.
        tensors: what the files hold, for messages.
        whole: the decoder gets all its tensors from here. Else it makes what is missing at random.
        experts: of modules of experts, by their paths, and each of their tables: names that `matrix` takes, in their order.
        rounded: what experts' tables are rounded to when the library has put them together; None leaves them.
    """

    modules: tuple[str, ...]
    matrix: Callable[[str], QuantizedMatrix | Tensor]
    plain: Callable[[], dict[str, Tensor]]
    tensors: Mapping[str, StoredTensor]
    whole: bool = True
    turned: bool = False
    experts: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    rounded: str | None = None


def stored_source(
    tensors: Mapping[str, StoredTensor], scheme: Scheme, where: object, experts: Sequence[Experts], device: torch.device
) -> Source:
    """A quantised checkpoint's weights, whose codes are taken apart on a device.

    Raises:
        ModelError: tensors that do not fit the scheme; the message names them.
    """
    read = tensor_reader(tensors)
    if scheme.method == "torchao":
        if any(tensor.key for tensor in tensors.values()):  # whose files are put together whole
            raise ModelError(f"torchao's weights are not read from {where}, which reads images too: {ADVICE}")
        state: dict[str, Tensor] = {}
        for file in sorted({tensor.file for tensor in tensors.values()}):
            parts = {name: read(name) for name, tensor in tensors.items() if tensor.file == file}
            with one_sentence(f"cannot load the model {where}"):
                state |= torchao_tensors(parts, metadata_of(file), where)
        return Source((), state.__getitem__, lambda: state, tensors)
    stored = stored_matrices(tensors, scheme, where)
    return Source(
        tuple(stored.matrices),
        lambda module: read_matrix(module, stored.matrices[module], scheme, lambda name: read(name).to(device)),
        lambda: {name: read(name) for name in stored.plain},
        tensors,
        turned=scheme.method in ("gptq", "awq"),
        experts=stored_parts(stored.matrices, experts),
    )


def rounded_source(
    tensors: Mapping[str, StoredTensor], kind: str, linears: Mapping[str, nn.Linear], device: torch.device
) -> Source:
    """A checkpoint's own weights, of which the linear layers' are rounded to 'fp8' or 'int4' when they are read, on a device."""
    read = tensor_reader(tensors)
    modules = [name for name, module in linears.items() if module.in_features % 32 == 0]
    modules = [name for name in modules if f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype in PLAIN]
    taken = {f"{name}.weight" for name in modules}
    return Source(
        tuple(modules),
        lambda module: quantized(read(f"{module}.weight").to(device), kind),
        lambda: {name: read(name) for name in tensors if name not in taken},
        tensors,
        rounded=kind,
    )


def random_source(
    scheme: Scheme | None,
    kind: str | None,
    linears: Mapping[str, nn.Linear],
    experts: Sequence[Experts],
    dtype: torch.dtype,
    device: torch.device,
) -> Source:
    """Random weights in the form of a scheme, or of a kind that weights are rounded to."""
    form = FORMS[kind] if kind is not None else scheme.form if scheme is not None else None
    modules = [
        name
        for name, module in linears.items()
        if form is not None and form.fits(module.in_features) and (scheme is None or scheme.quantizes(name))
    ]

    coded = [one for one in experts if form is not None and keeps_form(one, form, scheme)]
    tables = {name: (one.tables[table], one.count) for one in coded for name, table in one.names().items()}

    def made(n: int, k: int) -> QuantizedMatrix:
        assert form is not None
        return random_matrix(form, n, k, deviation=DEVIATION, dtype=dtype, device=device)

    def matrix(name: str) -> QuantizedMatrix:
        if name not in tables:
            return made(*linears[name].weight.shape)
        shape, count = tables[name]
        table = joined([made(*shape) for _ in range(count)])
        assert table is not None
        return table

    own = {one.path: {table: (name,) for name, table in one.names().items()} for one in coded}
    return Source(tuple(modules), matrix, dict, {}, whole=False, experts=own)


def keeps_form(experts: Experts, form: Form, scheme: Scheme | None) -> bool:
    """Whether experts of a checkpoint in a form keep their codes."""
    if scheme is not None and (not scheme.quantizes(experts.path) or scheme.orders_columns or not experts.is_stored_apart):
        return False
    return all(form.fits(k) and is_kept(form, k) for _, k in experts.tables.values())


def is_kept(form: Form, k: int) -> bool:
    """Whether kernels take matrices of a form with k columns; see `QuantizedMatrix.group`."""
    return k % 32 == 0 and form.columns % 32 == 0
