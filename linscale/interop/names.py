"""What each parameter is called elsewhere, as one table for both directions.

A form is a layout of names: "llama" (transformers' LlamaForCausalLM), "fla" (flash-linear-attention's HGRN2ForCausalLM)
or "plain" (torch_model.py). PyTorch's matrices are [outputs, inputs], ours [inputs, outputs]; ours of equal layers are
stacked on axis 0.
"""

import dataclasses
import functools

import jax
import numpy as np

from linscale import models
from linscale.config import Model
from linscale.models.transformer import layer_indices

_FFN = {f"ffn/{name}/kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_LAYER = {
    "llama": {
        **{f"mixer/{ours}/kernel": f"self_attn.{ours[0]}_proj.weight" for ours in ("query", "key", "value", "out")},
        "mixer_norm/scale": "input_layernorm.weight",
        "ffn_norm/scale": "post_attention_layernorm.weight",
        **_FFN,
    },
    "fla": {
        "mixer/query/kernel": "attn.q_proj.weight",
        "mixer/forget/kernel": "attn.f_proj.weight",
        "mixer/value/kernel": "attn.i_proj.weight",
        "mixer/out/kernel": "attn.o_proj.weight",
        **_FFN,
    },
}
_TOP = {
    "llama": {"embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"},
    "fla": {"embedding": "model.embeddings.weight", "layers/hgrn2/mixer/lower_bound": "model.lower_bounds"},
    "plain": {
        "embedding": "embedding.weight",
        "head": "head.weight",
        "final_norm/scale": "final_norm.weight",
        "tpe/coefficients": "tpe",
        "layers/hgrn2/mixer/lower_bound": "lower_bounds",
    },
}
# Norms' scales that fla's model has and ours has not.
FLA_NORMS = ("attn_norm.weight", "mlp_norm.weight", "attn.g_norm.weight")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where the array of one foreign name lies in our parameters."""

    path: tuple[str, ...]
    row: int | None  # of the stack; None: the whole array
    shape: tuple[int, ...]  # the foreign one

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"


def entries(model: Model, form: str) -> dict[str, Entry]:
    """Foreign name -> Entry, every parameter of the model exactly once."""
    shapes = jax.eval_shape(functools.partial(models.init, model), 0)
    out = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        path = tuple(key.key for key in key_path)
        name = _top_name("/".join(path), form)
        if name:
            out[name] = Entry(path, None, leaf.shape)
            continue
        _, kind, *rest = path
        for row, layer in enumerate(layer_indices(model)[kind]):
            shape = leaf.shape[1:][::-1] if rest[-1] == "kernel" else leaf.shape[1:]
            out[_layer_name("/".join(rest), layer, form)] = Entry(path, row, shape)
    return out


def _top_name(path: str, form: str) -> str | None:
    if form != "plain" and path == "head":
        return "lm_head.weight"
    return _TOP[form].get(path)


def _layer_name(path: str, layer: int, form: str) -> str:
    if form != "plain":
        return f"model.layers.{layer}.{_LAYER[form][path]}"
    path = path.removesuffix("/kernel").removesuffix("/scale") + (
        "/weight" if path.endswith(("kernel", "scale")) else ""
    )
    return f"layers.{layer}.{path.replace('/', '.')}"


def to_foreign(params: dict, entry: Entry) -> np.ndarray:
    array = params
    for key in entry.path:
        array = array[key]
    array = np.asarray(array if entry.row is None else array[entry.row])
    return array.T if entry.transposed else array


def from_foreign(arrays: dict[str, np.ndarray], table: dict[str, Entry]) -> dict:
    """Parameters, float32, of arrays that have the table's names and shapes."""
    stacks: dict[tuple, list] = {}
    for name, entry in table.items():
        array = np.asarray(arrays[name], np.float32)
        stacks.setdefault(entry.path, []).append((entry.row, array.T if entry.transposed else array))
    out: dict = {}
    for path, rows in stacks.items():
        rows.sort(key=lambda row: row[0] or 0)
        branch = out
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = rows[0][1] if rows[0][0] is None else np.stack([array for _, array in rows])
    return out


def differences(expected: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """What is missing, too much, or of another shape, one phrase each."""
    out = [f"{name} of shape {shape} is missing" for name, shape in expected.items() if name not in found]
    out += [f"{name} of shape {shape} has no place" for name, shape in found.items() if name not in expected]
    return out + [
        f"{name} has shape {found[name]} and must have {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]


def told(differences: list[str], most: int = 20) -> str:
    more = f"; and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more
