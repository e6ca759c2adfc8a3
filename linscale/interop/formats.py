"""config.json of each form (see names.py): written from our model, and read back as our model.

Two things of flash-linear-attention's HGRN2 differ from ours. Its queries are scaled by K^-1/2 and its output norm has
a fixed epsilon of 1e-5, which together are our `hgrn2_norm_epsilon` = K 1e-5 (K channels a head). A model of another
epsilon is exported with its value matrices times a power of two, which the norm takes out again and which changes no
digit; what is left is an epsilon up to twice too large or too small. Its feed-forward layer always has silu.
"""

import dataclasses
import math

import linscale
from linscale.config import ConfigError, Model, build
from linscale.models import tnl, tpe
from linscale.models.transformer import layer_indices

FLA_NORM_EPSILON = 1e-5  # of fla's rms_norm_linear, which its HGRN2 calls without its own
MODEL_FILE = "modeling_linscale.py"


def form_of(model: Model) -> str:
    """The most common form that can hold the model."""
    if model.arch == "llama" and model.ffn_activation in ("paper", "silu"):
        return "llama"
    if model.arch == "hgrn2" and model.ffn_activation == "silu" and model.hgrn2_query_activation == "silu":
        return "fla"
    return "plain"


def reason(model: Model) -> str:
    """Why a model of an architecture that others have goes into the plain form."""
    if model.arch == "llama":
        return "transformers' LLaMA has silu in its feed-forward layer, this model has none"
    if model.arch == "hgrn2":
        return "fla's HGRN2 has silu on queries and in its feed-forward layer, this model has not"
    return "transformers has no such architecture"


def value_scale(model: Model) -> float:
    """The power of two by which value matrices are multiplied in the form "fla"."""
    theirs = model.width // model.heads * FLA_NORM_EPSILON
    return 2.0 ** round(math.log2(theirs / max(model.hgrn2_norm_epsilon, 1e-12)) / 2)


def to_foreign(model: Model, form: str, sequence: int, separator: int | None) -> dict:
    """config.json without what is about the export itself. separator: token id that begins and ends a document."""
    common = {
        "hidden_size": model.width,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": sequence,
        "initializer_range": model.init_std,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": None,
        "use_cache": True,
    }
    if form == "llama":
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.heads,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "rope_theta": model.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": model.tied,
        }
    if form == "fla":
        return common | {
            "model_type": "hgrn2",
            "architectures": ["HGRN2ForCausalLM"],
            "num_hidden_layers": model.layers,
            "num_heads": model.heads,
            "expand_ratio": model.width // model.heads,
            "hidden_act": "swish",
            "norm_eps": model.norm_epsilon,
            "elementwise_affine": True,
            "use_short_conv": False,
            "use_lower_bound": True,
            "attn": None,
            "attnres_block_size": None,
            "tie_word_embeddings": model.tied,
        }
    kinds = {layer: kind for kind, layers in layer_indices(model).items() for layer in layers}
    kinds = [kinds[layer] for layer in range(model.layers)]
    chosen = model.ffn_activation
    decays = [tnl.log_decay(model, n).tolist() if kind == "tnl" else None for n, kind in enumerate(kinds)]
    return common | {
        "model_type": "linscale",
        "architectures": ["LinscaleForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_linscale.LinscaleConfig",
            "AutoModelForCausalLM": "modeling_linscale.LinscaleForCausalLM",
        },
        "kinds": kinds,
        "num_attention_heads": model.heads,
        "tied": model.tied,
        "norm_eps": model.norm_epsilon,
        "mixer_norm_eps": model.hgrn2_norm_epsilon if model.arch == "hgrn2" else 1e-6,
        "query_activation": model.hgrn2_query_activation,
        "value_activation": model.value_activation,
        "ffn_activations": {
            kind: ("silu" if kind == "llama" else "none") if chosen == "paper" else chosen for kind in set(kinds)
        },
        "rope_base": model.rope_base,
        "log_decays": decays if "tnl" in kinds else None,
        "tpe_decays": tpe.decays(model.width // model.heads).tolist() if model.arch == "cosformer2" else None,
        "tie_word_embeddings": False,  # the model file knows by itself
    }


def about(model: Model, **facts) -> dict:
    """The section of config.json from which our model is read back, with every field."""
    return {"linscale": {"version": linscale.__version__, "model": dataclasses.asdict(model)} | facts}


def to_ours(content: dict) -> tuple[Model, str]:
    """(model, form) of a config.json. Raises ConfigError with all that linscale's models have not."""
    form = {"llama": "llama", "hgrn2": "fla", "linscale": "plain"}.get(content.get("model_type"))
    if form is None:
        raise ConfigError(
            f"config.json has model_type {content.get('model_type')!r}; linscale reads llama, hgrn2 "
            "(flash-linear-attention's) and what linscale export wrote."
        )
    section = content.get("linscale")
    if section is None and form == "plain":
        raise ConfigError("config.json has no section linscale, which linscale export writes; export the run again.")
    try:
        if section is not None:
            model = _built(section["model"])
            _unchanged(content, to_foreign(model, form, 0, None))
            return model, form
        return (_llama if form == "llama" else _hgrn2)(content), form
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json cannot be read ({error!r}); fetch it again.") from error


def _built(fields: dict) -> Model:
    return build({"model": fields}).model


def _unchanged(content: dict, expected: dict) -> None:
    free = ("max_position_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    changed = [
        f"{name} is {content[name]!r} and was {value!r}"
        for name, value in expected.items()
        if name not in (*free, "architectures", "auto_map", "rope_theta") and content.get(name, value) != value
    ]
    if changed:
        raise ConfigError(f"config.json was changed after its export: {'; '.join(changed)}; restore it.")


def _refuse(content: dict, must: dict) -> None:
    """must: field -> the values it may have, None for absent included."""
    wrong = [
        f"{field} is {content[field]!r} and must be {' or '.join(map(repr, allowed))}"
        for field, allowed in must.items()
        if content.get(field) not in allowed and field in content
    ]
    if wrong:
        raise ConfigError(f"config.json describes a model that linscale has not: {'; '.join(wrong)}.")


def _llama(content: dict) -> Model:
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads, width = content["num_attention_heads"], content["hidden_size"]
    _refuse(
        content | {"rope_type": kind},
        {
            "rope_type": ("default",),
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "head_dim": (width // heads, None),
        },
    )
    return _built(
        {
            "arch": "llama",
            "layers": content["num_hidden_layers"],
            "width": width,
            "heads": heads,
            "ffn": content["intermediate_size"],
            "vocab_size": content["vocab_size"],
            "tied": bool(content.get("tie_word_embeddings", False)),
            "rope_base": float(rope.get("rope_theta", content.get("rope_theta", 10_000.0))),
            "norm_epsilon": float(content.get("rms_norm_eps", 1e-6)),
            "init_std": float(content.get("initializer_range", 0.02)),
        }
    )


def _hgrn2(content: dict) -> Model:
    width = content["hidden_size"]
    expand = content.get("expand_ratio", 128)
    heads = content.get("num_heads") or width // expand
    if expand is not None and heads * expand != width:  # fla's model would ignore num_heads
        raise ConfigError(
            f"config.json has expand_ratio {expand} and num_heads {heads}; their product must be hidden_size {width}."
        )
    _refuse(
        content,
        {
            "hidden_act": ("swish", "silu"),
            "use_short_conv": (False, None),
            "use_lower_bound": (True, None),
            "attn": (None,),
            "attnres_block_size": (None,),
        },
    )
    inner = content.get("intermediate_size")
    if inner is None:  # fla's rule
        inner = 256 * -(-int(width * (content.get("hidden_ratio") or 4) * 2 / 3) // 256)
    return _built(
        {
            "arch": "hgrn2",
            "layers": content["num_hidden_layers"],
            "width": width,
            "heads": heads,
            "ffn": inner,
            "vocab_size": content.get("vocab_size", 32_000),
            "tied": bool(content.get("tie_word_embeddings", False)),
            "norm_epsilon": float(content.get("norm_eps", 1e-6)),
            "hgrn2_norm_epsilon": width // heads * FLA_NORM_EPSILON,
            "ffn_activation": "silu",
            "init_std": float(content.get("initializer_range", 0.02)),
        }
    )
