"""A plain PyTorch model for what linscale trains and transformers does not have: TNL, cosFormer2, the hybrid, HGRN2.

`linscale export` copies this file beside the weights as modeling_linscale.py; transformers runs it when told to:

  AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It needs torch and transformers and nothing else. No kernels: fixed decays are worked out in chunks, HGRN2's gates token
by token. A cache holds one state a layer, of constant size for linear layers. Rows may be padded on their left.

Letters: B batch, T tokens, S tokens seen so far and now, D width, H heads, K channels of a head, E states of a channel.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

CHUNK = 128


class LinscaleConfig(PretrainedConfig):
    model_type = "linscale"

    def __init__(
        self,
        kinds=("tnl",),
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=192,
        vocab_size=264,
        tied=True,
        norm_eps=1e-6,
        mixer_norm_eps=1e-6,
        query_activation="silu",
        value_activation="none",
        ffn_activations=None,
        rope_base=10_000.0,
        log_decays=None,
        tpe_decays=None,
        **kwargs,
    ):
        self.kinds = list(kinds)  # of the layers, from the bottom: tnl, hgrn2, cosformer2 or llama
        self.num_hidden_layers = len(self.kinds)
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.intermediate_size, self.vocab_size, self.tied = intermediate_size, vocab_size, tied
        self.norm_eps, self.mixer_norm_eps, self.rope_base = norm_eps, mixer_norm_eps, rope_base
        self.query_activation, self.value_activation = query_activation, value_activation
        self.ffn_activations = ffn_activations or {}  # kind -> none or silu
        self.log_decays = log_decays  # tnl: [layer][head]; None for layers of another kind
        self.tpe_decays = tpe_decays  # cosformer2: [E]
        super().__init__(**kwargs)


@dataclasses.dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    states: dict | None = None


def activation(name):
    return {"none": lambda x: x, "silu": F.silu}[name]


def rms_norm(x_BTD, epsilon):
    x = x_BTD.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(x_BTD.dtype)


class Norm(nn.Module):
    def __init__(self, width, epsilon, scaled):
        super().__init__()
        self.epsilon = epsilon
        if scaled:
            self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD):
        x_BTD = rms_norm(x_BTD, self.epsilon)
        return x_BTD * self.weight if hasattr(self, "weight") else x_BTD


def linear_attention(q_BTHK, k_BTHK, v_BTHK, log_decay_H, state_BHKV):
    """o_t = S_t^T q_t with S_t = lambda S_{t-1} + k_t v_t^T, in chunks -> (o, the last S). Float32."""
    out = []
    for at in range(0, q_BTHK.shape[1], CHUNK):
        q, k, v = (x[:, at : at + CHUNK] for x in (q_BTHK, k_BTHK, v_BTHK))
        i = torch.arange(q.shape[1], device=q.device)
        apart = i[:, None] - i
        mask_HTS = torch.where(apart >= 0, torch.exp(log_decay_H[:, None, None] * apart.clamp(min=0)), 0.0)
        within = torch.einsum("bthk,bshk->bhts", q, k) * mask_HTS
        o = torch.einsum("bhts,bshv->bthv", within, v)
        to_TH = torch.exp((i + 1)[:, None] * log_decay_H)
        out.append(o + torch.einsum("bthk,bhkv->bthv", q * to_TH[..., None], state_BHKV))
        left_TH = torch.exp((len(i) - 1 - i)[:, None] * log_decay_H)
        new = torch.einsum("bthk,bthv->bhkv", k * left_TH[..., None], v)
        state_BHKV = torch.exp(log_decay_H * len(i))[:, None, None] * state_BHKV + new
    return torch.cat(out, 1), state_BHKV


def gated_linear_attention(q_BTHK, forget_BTHK, k_BTHK, v_BTHK, state_BHKV):
    """o_t = S_t^T q_t with S_t = diag(f_t) S_{t-1} + k_t v_t^T, token by token -> (o, the last S). Float32."""
    out = []
    for q, f, k, v in zip(*(x.unbind(1) for x in (q_BTHK, forget_BTHK, k_BTHK, v_BTHK))):
        state_BHKV = f[..., None] * state_BHKV + k[..., None] * v[..., None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q, state_BHKV))
    return torch.stack(out, 1), state_BHKV


def rotate(x_BTHK, position_BT, base):
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BTHK.device, dtype=torch.float32) / half)
    angle = position_BT[..., None, None].float() * frequency
    a, b = x_BTHK.float().split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHK.dtype)


class LowRankGate(nn.Module):
    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x_BTD):
        return torch.sigmoid(self.up(self.down(x_BTD)))


class Mixer(nn.Module):
    def __init__(self, config, kind, layer):
        super().__init__()
        self.config, self.kind, self.layer = config, kind, layer
        width, heads = config.hidden_size, config.num_attention_heads
        for name in ("query", "forget" if kind == "hgrn2" else "key", "value", "out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        if kind in ("tnl", "cosformer2"):
            self.gate = LowRankGate(width, width // heads)
        if kind == "cosformer2":
            self.theta = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x_BTD, state, *, first, mask_BS, beta_D):
        """first: tokens seen before. mask_BS: False on padding, or None. Returns (out, the state after)."""
        heads = lambda x: x.unflatten(-1, (self.config.num_attention_heads, -1))  # noqa: E731
        if self.kind == "llama":
            return self.softmax_attention(x_BTD, state, heads, first, mask_BS)
        c, kind = self.config, self.kind
        q = activation(c.query_activation if kind == "hgrn2" else "silu")(self.query(x_BTD))
        v = activation("none" if kind == "hgrn2" else c.value_activation)(self.value(x_BTD))
        if kind == "hgrn2":
            x = self.forget(x_BTD).float()
            forget = heads(beta_D + (1 - beta_D) * torch.sigmoid(x))
            k = (1 - beta_D) * torch.sigmoid(-x)  # 1 - f with all its digits
        else:
            k = F.silu(self.key(x_BTD))
        q, k, v = heads(q).float(), heads(k).float(), heads(v).float()
        if mask_BS is not None:
            k = k * mask_BS[:, first:, None, None]  # padding puts nothing into the state, which is still empty
        if kind == "cosformer2":  # q k cos((t - s) theta) is a product of cosines plus one of sines
            t = torch.arange(first, first + x_BTD.shape[1], device=x_BTD.device, dtype=torch.float64)
            angle = t[:, None, None] * self.theta.double()
            cos, sin = angle.cos().float(), angle.sin().float()
            q, k = (torch.cat([x * cos, x * sin], -1) for x in (q, k))
        if state is None:
            state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        if kind == "hgrn2":
            out, state = gated_linear_attention(q, forget, k, v, state)
        else:
            decay = torch.zeros(q.shape[2]) if kind == "cosformer2" else torch.tensor(c.log_decays[self.layer])
            out, state = linear_attention(q, k, v, decay.to(q), state)
        out = rms_norm(out.flatten(-2).to(x_BTD.dtype), c.mixer_norm_eps)
        return self.out(out if kind == "hgrn2" else out * self.gate(x_BTD)), state

    def softmax_attention(self, x_BTD, state, heads, first, mask_BS):
        q, k, v = (heads(w(x_BTD)) for w in (self.query, self.key, self.value))
        tokens, seen = x_BTD.shape[1], first + x_BTD.shape[1]
        at = torch.arange(seen, device=x_BTD.device)
        position = at[None, first:] if mask_BS is None else (mask_BS.cumsum(1) - 1).clamp(min=0)[:, first:]
        q, k = (rotate(x, position, self.config.rope_base) for x in (q, k))
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        allowed = at[None, :] <= at[seen - tokens :, None]
        if mask_BS is not None:  # a padded token looks at itself, so that no row of the softmax is empty
            same = at[None, :] == at[seen - tokens :, None]
            allowed = (allowed & mask_BS[:, None, :].bool() | same)[:, None]
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)
        return self.out(out.transpose(1, 2).flatten(-2)), (k, v)


class FeedForward(nn.Module):
    def __init__(self, width, inner, act):
        super().__init__()
        self.up, self.gate = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down, self.act = nn.Linear(inner, width, bias=False), activation(act)

    def forward(self, x_BTD):
        return self.down(self.up(x_BTD) * self.act(self.gate(x_BTD)))


class Block(nn.Module):
    def __init__(self, config, kind, layer):
        super().__init__()
        norm = lambda: Norm(config.hidden_size, config.norm_eps, kind == "llama")  # noqa: E731
        self.mixer_norm, self.mixer, self.ffn_norm = norm(), Mixer(config, kind, layer), norm()
        self.ffn = FeedForward(config.hidden_size, config.intermediate_size, config.ffn_activations.get(kind, "none"))

    def forward(self, x_BTD, state, **context):
        mixed, state = self.mixer(self.mixer_norm(x_BTD), state, **context)
        x_BTD = x_BTD + mixed
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), state


def relative_position(x_BTD, coefficients_DE, decays, state_BDE):
    """TPE: u_t = lambda u_{t-1} + (1 - lambda) x_t and y_t = sum_e C_e u_te, token by token -> (y, the last u)."""
    lam_E = torch.tensor(decays).to(x_BTD.device, torch.float32)
    coefficients_DE = coefficients_DE.float()
    out = []
    for x_BD in x_BTD.float().unbind(1):
        state_BDE = lam_E * state_BDE + (1 - lam_E) * x_BD[..., None]
        out.append((state_BDE * coefficients_DE).sum(-1))
    return torch.stack(out, 1).to(x_BTD.dtype), state_BDE


class LinscaleForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LinscaleConfig
    _is_stateful = True

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        if "cosformer2" in config.kinds:
            self.tpe = nn.Parameter(torch.zeros(width, len(config.tpe_decays)))
        if "hgrn2" in config.kinds:
            self.lower_bounds = nn.Parameter(torch.ones(len(config.kinds), width))
        self.layers = nn.ModuleList([Block(config, kind, layer) for layer, kind in enumerate(config.kinds)])
        self.final_norm = Norm(width, config.norm_eps, set(config.kinds) == {"llama"})
        if not config.tied:
            self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(
        self, input_ids, attention_mask=None, states=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs
    ):
        """states: of an earlier call; input_ids [B,T] continue it. attention_mask: [B, all tokens so far], or None."""
        x_BTD = self.embedding(input_ids)
        first = states["seen"] if states else 0
        mask_BS = attention_mask if attention_mask is not None and not bool(attention_mask.all()) else None
        after = {"seen": first + input_ids.shape[1], "tpe": None, "layers": []}
        if hasattr(self, "tpe"):
            state = states["tpe"] if states else x_BTD.new_zeros(*x_BTD[:, 0].shape, self.tpe.shape[1]).float()
            padded = x_BTD if mask_BS is None else x_BTD * mask_BS[:, first:, None]
            x_BTD, after["tpe"] = relative_position(padded, self.tpe, self.config.tpe_decays, state)
        beta_LD = None
        if hasattr(self, "lower_bounds"):
            share = self.lower_bounds.float().softmax(0)
            beta_LD = share.cumsum(0) - share[:1]
        for n, layer in enumerate(self.layers):
            state, beta_D = states["layers"][n] if states else None, None if beta_LD is None else beta_LD[n]
            x_BTD, state = layer(x_BTD, state, first=first, mask_BS=mask_BS, beta_D=beta_D)
            after["layers"].append(state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = self.final_norm(x_BTD)[:, kept]
        logits = F.linear(hidden, self.embedding.weight if self.config.tied else self.head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits, states=after if use_cache else None)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(self, input_ids, states=None, attention_mask=None, use_cache=True, **kwargs):
        if states is not None:
            input_ids = input_ids[:, states["seen"] :]
        return {"input_ids": input_ids, "states": states, "attention_mask": attention_mask, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        return model_kwargs | {"states": outputs.states}
