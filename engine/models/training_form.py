"""The form in which diffusers' models train fastest: other modules around the same weights, turned back when they are saved.

- Convolution weights are stored channels last, (out, height, width, in), as tensor cores read them. A `memory_format` would not
  survive a flat buffer, which holds parameters in logical order; so the parameter itself has that shape, and the convolution
  sees it permuted back. Activations follow the weights.
- Activations stay channels last. diffusers copies to contiguous memory before a shortcut, after a transformer's blocks and,
  from 64 samples on, before upsampling; the convolution that follows copies back.
- The group normalisations of residual blocks take the SiLU, and a time embedding's scale and shift, into the same pass.
- Between the two linear layers of Wuerstchen's residual blocks, GELU, GlobalResponseNorm and dropout are one operation.
- Projections of the same tokens are one matrix product: queries, keys and values, or keys and values alone; and those of their
  adapters (lora.py) two more. Where they are of few tokens, attention reads them as they are stacked (engine::short_attention).
- GELU and its gate, between the linear layers of a transformer's block, are one operation.
- What is frozen keeps nothing for a gradient that nobody asks for: autograd's convolution would keep its input.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.wuerstchen.modeling_wuerstchen_common import GlobalResponseNorm, ResBlock, TimestepBlock
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from engine.kernels import geglu, gelu, gelu_response_norm, group_norm_silu, short_attention
from engine.kernels.short_attention import fits, pays_on
from engine.models.lora import NAME, AdaptedLinear, can_stack, has_adapter, is_plain_linear

# What is fused -> the published projections that it stacks.
PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True)
class Form:
    """What a model in training form fuses.

    norms_when_compiled: group normalisation is our kernel in compiled models too, and not inductor's, which fuses it with what
        is around it and copies for it between memory formats (docs/performance.md).
    projections: projections of the same tokens are one matrix product.
    activations_when_compiled: GELU, with its gate or GlobalResponseNorm and dropout, is our kernel in compiled models too:
        inductor's take three and seven times as long as their bytes would (docs/performance.md).
    """

    norms_when_compiled: bool = True
    projections: bool = True
    activations_when_compiled: bool = True


SHIPPED = Form()


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose `weight` is stored as [out, height, width, in]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if learns or not input.requires_grad or self.padding_mode != "zeros":
            result = super()._conv_forward(input, weight.permute(0, 3, 1, 2), bias)
            return ChannelsLastGradient.apply(result) if result.is_cuda and torch.compiler.is_compiling() else result
        return FrozenConvolution.apply(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ChannelsLastGradient(torch.autograd.Function):
    """An image [B, C, H, W] whose gradient comes stored channels last.

    Inductor hands a convolution's backward pass part of a concatenation's gradient, or one stored in another order, which
    cuDNN then copies in a kernel of its own, at half of memory's speed; asked for here, it is written so in the first place.
    """

    @staticmethod
    def forward(image: Tensor) -> Tensor:
        return image.view_as(image)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose weights, stored as [out, height, width, in], get no gradient: it keeps these, and not its input."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return F.conv2d(input, weight.permute(0, 3, 1, 2), bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(weight)
        ctx.shape = input.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        found = conv2d_input(ctx.shape, weight.permute(0, 3, 1, 2), gradient, *ctx.geometry)
        return found, *(None,) * 6


class GroupNorm(nn.GroupNorm):
    """Group normalisation, `silu` with the activation, for tensors [B, C, ...] stored channels last.

    fuses_when_compiled: as `Form.norms_when_compiled`.
    """

    silu = False
    fuses_when_compiled = False

    def forward(self, input: Tensor) -> Tensor:
        return normalise(self, input, self.silu)


class ResnetBlock(ResnetBlock2D):
    """diffusers' residual block: norm, SiLU, convolution, twice, with the time embedding in between."""

    norm1: GroupNorm
    norm2: GroupNorm

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden, shortcut = normalise(self.norm1, input_tensor, True), input_tensor
        for resize in (self.upsample, self.downsample):
            if resize is not None:
                hidden, shortcut = resize(hidden), resize(shortcut)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            hidden = normalise(self.norm2, hidden, True, scale, shift)
        else:
            hidden = normalise(self.norm2, hidden if temb is None else hidden + temb[:, :, None, None], True)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return _divided(shortcut + hidden, self.output_scale_factor)


class Upsample(Upsample2D):
    """diffusers' upsampling to twice the size, or to `output_size`, and its convolution."""

    conv: Any

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is None and hidden_states.is_cuda and torch.compiler.is_compiling():
            hidden_states = doubled(hidden_states)
        else:
            scale = 2.0 if output_size is None else None
            hidden_states = F.interpolate(hidden_states, output_size, scale, mode="nearest")
        return self.conv(hidden_states) if self.use_conv else hidden_states


def doubled(image: Tensor) -> Tensor:
    """[B, C, H, W] stored channels last, each position four times: [B, C, 2 H, 2 W].

    As a view that is copied, whose backward pass adds four values; inductor's for interpolation adds each to an fp32 image in
    memory, one after another, which takes several times as long as their bytes would.
    """
    batch, channels, height, width = image.shape
    rows = image.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return rows.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def _divided(tensor: Tensor, factor: float) -> Tensor:
    """tensor / factor. By 1, as in every published model, autograd's backward pass would be a copy."""
    return tensor if factor == 1 else tensor / factor


class Transformer(Transformer2DModel):
    """diffusers' transformer over the positions of an image [B, C, H, W]."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """The output's projection and the residual connection; `hidden_states` [B, H W, inner_dim]."""
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (image if self.use_linear_projection else self.proj_out(image)) + residual


def fuses(module: "GroupNorm | ResponseNorm | GatedLinear | ActivatedLinear", x: Tensor) -> bool:
    """Whether a normalisation or an activation runs as our kernel."""
    return x.is_cuda and (module.fuses_when_compiled or not torch.compiler.is_compiling())


def normalise(norm: GroupNorm, x: Tensor, silu: bool, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """y = norm(x), then y (1 + scale) + shift with a time embedding's [B, C] values if there are any, then SiLU."""
    if fuses(norm, x):
        weight: Tensor = norm.weight
        bias: Tensor = norm.bias
        if scale is not None and shift is not None:
            factor = 1 + scale.float()
            weight, bias = weight * factor, bias * factor + shift
        return group_norm_silu(x, weight, bias, norm.num_groups, norm.eps, silu)
    if torch.is_grad_enabled() and norm.weight.requires_grad and not (x.is_cuda or x.requires_grad):
        x = x.contiguous()  # what lies before is frozen, and torch's backward pass on the CPU then crashes over channels last
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


class GatedLinear(GEGLU):
    """diffusers' linear layer [..., C] -> [..., 2 D] whose second half, by GELU, is the gate of its first.

    fuses_when_compiled: as `Form.activations_when_compiled`.
    """

    fuses_when_compiled = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if fuses(self, hidden_states):
            return geglu(self.proj(hidden_states))
        return super().forward(hidden_states, *args, **kwargs)


class ActivatedLinear(GELU):
    """diffusers' linear layer with the exact GELU.

    fuses_when_compiled: as `Form.activations_when_compiled`.
    """

    fuses_when_compiled = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return gelu(self.proj(hidden_states)) if fuses(self, hidden_states) else super().forward(hidden_states)


class Timestep(TimestepBlock):
    """Wuerstchen's scale and shift by a timestep, whose sines [B, C] come in fp32: the weights may have another precision."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.to(self.mapper.weight.dtype))


class ResponseNorm(GlobalResponseNorm):
    """Wuerstchen's normalisation of hidden states [B, H, W, C], with the activation before it and the dropout after it.

    They come to it, and not its weights to them: at stage 3 DeepSpeed gathers weights where their own module is called.

    fuses_when_compiled: as `Form.activations_when_compiled`.
    """

    fuses_when_compiled = False

    def forward(self, x: Tensor, activation: nn.GELU, dropout: nn.Dropout) -> Tensor:  # type: ignore[override]
        if fuses(self, x):
            return gelu_response_norm(x, self.gamma.flatten(), self.beta.flatten(), dropout.p if dropout.training else 0.0)
        return dropout(super().forward(activation(x)))


class Channelwise(nn.Sequential):
    """What a residual block of Wuerstchen does at each position: two linear layers, and a `ResponseNorm` between them."""

    def forward(self, x: Tensor) -> Tensor:
        expand, activation, norm, dropout, contract = self
        return contract(norm(expand(x), activation, dropout))


class TextEmbeddings(CLIPTextEmbeddings):
    """CLIP's embeddings of tokens [B, N] and their positions, and no look at a weight that ZeRO 3 gathers later only."""

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.embed(input_ids) + self.position_embedding(self.position_ids[:, : input_ids.shape[1]])

    def embed(self, input_ids: Tensor) -> Tensor:
        """The vectors of tokens [B, N], [B, N, C]."""
        return self.token_embedding(input_ids)


class FusedAttention(Attention):
    """diffusers' attention over hidden states [B, N, C] or [B, C, H, W], with its projections fused.

    Queries attend to the hidden states themselves, or to `encoder_hidden_states`; with added projections (Kandinsky's decoder)
    to both.

    may_be_short: our kernel takes what fits it (`let_be_short`).
    """

    may_be_short = False
    to_qkv: nn.Linear
    to_kv: nn.Linear
    to_added_kv: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        residual = hidden_states
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, tokens, _ = hidden_states.shape
        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        projected = self.to_qkv(hidden_states) if hasattr(self, "to_qkv") else None
        if projected is not None and is_short(self, projected, attention_mask):
            attended = short_attention(projected, self._mask(attention_mask, tokens, batch), self.heads)
        else:
            attended = self._attend(hidden_states, context, projected, attention_mask)
        projection, dropout = self.to_out
        attended = dropout(projection(attended))
        if residual.dim() == 4:
            attended = attended.transpose(1, 2).reshape(residual.shape)
        if self.residual_connection:
            attended = attended + residual
        return _divided(attended, self.rescale_output_factor)

    def _attend(
        self, hidden_states: Tensor, context: Tensor, projected: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Attention in torch's kernels, [B, N, C]; `projected` are the hidden states' queries, keys and values if stacked."""
        batch, tokens, _ = hidden_states.shape
        keys_and_values: list[tuple[Tensor, ...]] = []
        if hasattr(self, "to_added_kv"):
            keys_and_values.append(self._heads(self.to_added_kv(context), 2))
        if projected is not None:
            query, *own = self._heads(projected, 3)
            keys_and_values.append(tuple(own))
        else:
            (query,) = self._heads(self.to_q(hidden_states), 1)
        if hasattr(self, "to_kv"):
            keys_and_values.append(self._heads(self.to_kv(context), 2))
        key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in zip(*keys_and_values, strict=True))
        mask = self._mask(attention_mask, key.shape[2], batch)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).reshape(batch, tokens, -1)

    def _mask(self, attention_mask: Tensor | None, keys: int, batch: int) -> Tensor | None:
        """What diffusers repeats for every head, [B, 1, ..., keys]: one of them broadcasts."""
        if attention_mask is None:
            return None
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])[:, :1]

    def _heads(self, projected: Tensor, number: int) -> tuple[Tensor, ...]:
        """[B, N, number * C] as `number` tensors [B, heads, N, head size]."""
        split = projected.unflatten(-1, (number, self.heads, -1))
        return split.permute(2, 0, 3, 1, 4).unbind()


def is_short(attention: FusedAttention, projected: Tensor, mask: Tensor | None) -> bool:
    """Whether our kernel attends within what was projected, [B, N, 3 C]: on a GPU, and where there are no other keys."""
    if not (attention.may_be_short and projected.is_cuda) or hasattr(attention, "to_kv") or hasattr(attention, "to_added_kv"):
        return False
    tokens, size = projected.shape[1], projected.shape[-1] // (3 * attention.heads)
    return fits(tokens, size, projected.dtype, mask)


def let_be_short(model: nn.Module, device: torch.device) -> bool:
    """Gives attention within few tokens to our kernel, in place, if it is made for this device; returns whether it is."""
    ours = pays_on(device)
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.may_be_short = ours
    return ours


def to_training_form(model: Any, form: Form, learns_like: Callable[[str], Hashable] = lambda name: None) -> None:
    """Changes a diffusers model in place.

    Args:
        learns_like: of a published parameter, by name: projections of which it is not the same are not stacked.
    """
    self_attentions = {block.attn1 for block in model.modules()
                       if isinstance(block, BasicTransformerBlock) and not block.only_cross_attention}  # fmt: skip
    # DoRA takes the norm of a convolution's weights, and reads them as they were published.
    as_published = {inner for layer in model.modules() if getattr(layer, "lora_variant", None) for inner in layer.modules()}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and module not in as_published:
            module.__class__ = ChannelsLastConv2d
            turned = module.weight.detach().permute(0, 2, 3, 1)
            # A clone and not .contiguous(), which leaves odd strides to dimensions of size one.
            module.weight = nn.Parameter(turned.clone(memory_format=torch.contiguous_format), module.weight.requires_grad)
        elif type(module) is nn.GroupNorm:
            norm: Any = module
            norm.__class__, norm.fuses_when_compiled = GroupNorm, form.norms_when_compiled
        elif type(module) is ResnetBlock2D and isinstance(module.nonlinearity, nn.SiLU):
            module.__class__ = ResnetBlock
        elif type(module) is Upsample2D and _is_nearest(module):
            module.__class__ = Upsample
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.__class__ = Transformer
        elif type(module) is CLIPTextEmbeddings:
            module.__class__ = TextEmbeddings
        elif type(module) is TimestepBlock:
            module.__class__ = Timestep
        elif type(module) is ResBlock:
            module.channelwise.__class__ = Channelwise
            norm = module.channelwise[2]
            norm.__class__, norm.fuses_when_compiled = ResponseNorm, form.activations_when_compiled
        elif type(module) is GEGLU or (type(module) is GELU and module.approximate == "none"):
            layer: Any = module
            layer.__class__ = GatedLinear if type(module) is GEGLU else ActivatedLinear
            layer.fuses_when_compiled = form.activations_when_compiled
        elif type(module) is Attention and form.projections and _is_plain(module) and _learns_alike(name, module, learns_like):
            _fuse(module, module in self_attentions)
    _adapt_plainly(model)
    _activate_last_norms(model)


def _adapt_plainly(model: Any) -> None:
    """Replaces PEFT's linear layers that have nothing but an adapter by ours."""
    for name, module in list(model.named_modules()):
        if is_plain_linear(module):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, AdaptedLinear(module.base_layer, [module]))


def _activate_last_norms(model: Any) -> None:
    """Lets the normalisation before an output's convolution take its SiLU."""
    for module in model.modules():
        if isinstance(getattr(module, "conv_norm_out", None), GroupNorm) and isinstance(module.conv_act, nn.SiLU):
            module.conv_norm_out.silu, module.conv_act = True, nn.Identity()


def form_of(model: nn.Module) -> Form:
    """The form that a model in training form was given, as its modules remember it; without such modules, the shipped one."""
    modules = list(model.modules())

    def fuse_when_compiled(*kinds: type) -> bool:
        return all(module.fuses_when_compiled for module in modules if isinstance(module, kinds))

    return Form(
        norms_when_compiled=fuse_when_compiled(GroupNorm),
        projections=any(isinstance(module, FusedAttention) for module in modules),
        activations_when_compiled=fuse_when_compiled(GatedLinear, ActivatedLinear, ResponseNorm),
    )


def _is_nearest(upsample: Any) -> bool:
    """Whether an upsampling is by nearest neighbours, with no further parts than a convolution."""
    return upsample.interpolate and not upsample.use_conv_transpose and upsample.norm is None and upsample.name == "conv"


def _is_plain(attn: Any) -> bool:
    """Whether an attention has none of the parts that `FusedAttention` leaves out."""
    extras = (attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return all(extra is None or extra is False for extra in extras)


def _learns_alike(path: str, attn: Any, learns_like: Callable[[str], Hashable]) -> bool:
    """Whether the projections that could be stacked learn alike."""
    alike: dict[str, set[Hashable]] = {}
    for name, _ in attn.named_parameters():
        (published,) = published_names(f"{path}.{name}")
        layer, _, kind = published.removeprefix(f"{path}.").partition(".")
        if any(layer in parts for parts in PROJECTIONS.values()):
            alike.setdefault(kind, set()).add(learns_like(published))
    return all(len(kinds) == 1 for kinds in alike.values())


def _fuse(attn: Any, attends_to_itself: bool) -> None:
    """Stacks the projections of an attention, unless their adapters keep them apart."""
    has_added = attn.add_k_proj is not None
    stacks = ["to_added_kv"] if has_added else []
    if not attn.only_cross_attention:
        stacks.append("to_qkv" if has_added or attends_to_itself else "to_kv")
    if not all(can_stack([getattr(attn, part) for part in PROJECTIONS[name]]) for name in stacks):
        return
    for name in stacks:
        _stack(attn, name)
    if has_added:
        attn.residual_connection = True  # always, for this kind
    attn.__class__ = FusedAttention


def _stack(attn: Any, name: str) -> None:
    """Replaces projections by one linear layer that gives all of them, with their adapters if they have any."""
    layers = [getattr(attn, part) for part in PROJECTIONS[name]]
    adapted = any(has_adapter(layer) for layer in layers)
    bases = [layer.base_layer if has_adapter(layer) else layer for layer in layers]
    first, outputs = bases[0], sum(base.out_features for base in bases)
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, outputs, bias=first.bias is not None)
    for kind in ("weight", "bias") if first.bias is not None else ("weight",):
        published = [getattr(base, kind) for base in bases]
        stacked = torch.cat([parameter.detach() for parameter in published])
        setattr(fused, kind, nn.Parameter(stacked, requires_grad=published[0].requires_grad))
    for part in PROJECTIONS[name]:
        delattr(attn, part)
    setattr(attn, name, AdaptedLinear(fused, layers) if adapted else fused)


def published_names(name: str) -> list[str]:
    """What the published model calls a parameter of the training form, or those that are stacked in it."""
    owner, _, kind = name.replace(".base_layer.", ".").replace(f".{NAME}.", ".").rpartition(".")
    path, _, layer = owner.rpartition(".")
    kinds = (kind, "weight") if kind in ("lora_A", "lora_B") else (kind,)
    return [_joined(path, part, *kinds) for part in PROJECTIONS.get(layer, (layer,))]


def sizes_by_place(sizes: Mapping[str, int]) -> Counter[str]:
    """Elements of parameters in training form, those of the projections of an attention together: the same in every form."""
    projections = {part for parts in PROJECTIONS.values() for part in parts}
    places = Counter[str]()
    for name, size in sizes.items():
        places[".".join(word for word in published_names(name)[0].split(".") if word not in projections)] += size
    return places


def to_published_form(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors laid out as the parameters of a model in training form, by name, as the published model has them: views.

    Those of adapters have PEFT's names, without that of the adapter.
    """
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ChannelsLastConv2d)}
    adapted = {name: module.adapted for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for stored, tensor in tensors:
        tensor = tensor.permute(0, 3, 1, 2) if stored in turned else tensor
        name = stored.replace(".base_layer.", ".").replace(f".{NAME}.", ".")
        owner, _, kind = name.rpartition(".")
        path, _, layer = owner.rpartition(".")
        parts = PROJECTIONS.get(layer, (layer,))
        if owner in adapted and kind in ("lora_A", "lora_B"):
            pieces = tensor.chunk(len(adapted[owner]))
            for number, piece in zip(adapted[owner], pieces, strict=True):
                yield _joined(path, parts[number], kind, "weight"), piece.view(-1, piece.shape[-1])
        elif layer in PROJECTIONS:
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                yield _joined(path, part, kind), piece
        else:
            yield name, tensor


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def adapters_of(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Path in the published model of each layer that has an adapter in one in training form -> rank and alpha."""
    found: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        path, _, layer = name.rpartition(".")
        if isinstance(module, AdaptedLinear):
            parts = PROJECTIONS.get(layer, (layer,))
            found |= {_joined(path, parts[number]): (module.rank, module.alpha) for number in module.adapted}
        elif has_adapter(module):
            found[name] = module.r[NAME], module.lora_alpha[NAME]
    return found


def alphas_of(model: nn.Module) -> dict[str, float]:
    """The same -> alpha."""
    return {name: alpha for name, (_, alpha) in adapters_of(model).items()}
