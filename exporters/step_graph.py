"""The graph of one decode step, made of the operators that fuse what stands around a layer's products.

It says the same as model.onnx does of one token a row, over the same weights, in three operators a layer (Mamba-2) or
four (Mamba): a TensorRT engine of it is a chain of our kernels. Where a model has what they do not cover there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, TensorSpec
from mamba_deploy.exporters.functions import (
    DOMAIN,
    PLUGIN,
    VERSION,
    conv_body,
    element_type,
    parse_function,
    selective_scan_body,
    ssd_scan_body,
    to_float,
)

__all__ = ["covers", "step_bodies", "step_graph"]

_MOST_SHARED = 96_000  # bytes for a row, of every GPU from compute capability 8.0 on; 7.5 has two thirds of that


def covers(config: MambaConfig, contract: Contract) -> bool:
    """Whether the operators can be the model's step: see the sizes that ``mamba_kernels.h`` asks for."""
    c = config
    item = 4 if contract.dtype == "float32" else 2
    vector = 16 // item
    widths = [c.d_model, c.d_inner]
    # What a block keeps of a row in shared memory: the norm's weights in float32, the row, its norm.
    in_shared = [(8 if item == 4 else 10) * c.d_model, (item + (4 if c.generation == "mamba2" else 0)) * c.d_inner]
    if max(in_shared) > _MOST_SHARED:
        return False
    if c.generation == "mamba":
        widths += [2 * c.d_inner, c.dt_rank + 2 * c.d_state]
    else:
        if c.d_mlp or (c.gated_norm and c.norm_before_gate):
            return False
        widths += [_projected(c), c.n_groups * c.d_state]
        state = 16 // (4 if contract.state_dtype == "float32" else 2)
        lanes = min(32, max(4, 1 << max(c.d_state // state - 1, 0).bit_length()))
        if c.d_state % state or c.head_dim % (4 * 32 // lanes):
            return False
    return all(width % vector == 0 for width in widths)


def _projected(c: MambaConfig) -> int:
    return c.d_inner + c.conv_channels + c.n_heads


def _conv_first(c: MambaConfig) -> int:
    """The column of the projection where those that are convolved begin."""
    return 0 if c.generation == "mamba" else c.d_inner


def step_graph(model: onnx.ModelProto, config: MambaConfig, contract: Contract) -> onnx.ModelProto:
    """The graph: inputs and outputs of the contract with seq 1, but for ``next_token``; without function bodies.

    Args:
        model: ``model.onnx``, whose weights it refers to, loaded without them.
        config: The architecture, which :func:`covers` covers.
        contract: Of the model.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    used: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *, optional: bool = False) -> str:
        """Its name in the graph, stored as [inputs, outputs] where it is that of a product; "" where there is none."""
        found = next((n for n in (f"{name}_t", name) if n in weights), None)
        if found is None:
            if optional:
                return ""
            raise KeyError(name)
        used[found] = weights[found]
        return found

    def ours(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        made = {**attributes, **PLUGIN}
        nodes.append(helper.make_node(op, inputs, outputs, name=f"node_{outputs[0]}", domain=DOMAIN, **made))

    nodes.append(
        helper.make_node("Gather", [weight("embedding.weight"), "input_ids"], ["embedded"], name="node_embedding")
    )
    nodes.append(helper.make_node("Cast", ["embedded"], ["hidden.start"], name="node_hidden", to=TensorProto.FLOAT))
    hidden = "hidden.start"
    for i in range(config.n_layer):
        hidden = _layer(i, hidden, config, weight, ours)
    head = weight("embedding.weight" if config.tie_embeddings else "lm_head.weight")
    logits = "last_logits" if contract.all_logits else "logits"
    ours("MambaHead", [hidden, weight("norm_f.weight"), head], [logits], eps=config.norm_eps)
    if contract.all_logits:
        axis = helper.make_tensor("seq_axis", TensorProto.INT64, [1], [1])
        used[axis.name] = axis
        nodes.append(helper.make_node("Unsqueeze", [logits, axis.name], ["logits"], name="node_logits"))
    graph = helper.make_graph(
        nodes,
        "step",
        [_value(spec) for spec in contract.inputs],
        [_value(spec) for spec in contract.outputs if spec.role != "next_token"],
        list(used.values()),
    )
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    axes = [1 if axis == "seq" else axis for axis in spec.axes]
    return helper.make_tensor_value_info(spec.name, element_type(spec.dtype), axes)


def _layer(i: int, hidden: str, c: MambaConfig, weight: Callable[..., str], ours: Callable[..., None]) -> str:
    """A layer's nodes; the name of the residual stream after it."""
    own = f"layers.{i}.mixer."
    norm, lengths = weight(f"layers.{i}.norm.weight"), "seq_lens"
    conv = [weight(own + "conv_weight"), weight(own + "conv_bias", optional=True), f"conv_state.{i}", lengths]
    inputs = [hidden, norm, weight(own + "in_proj.weight"), weight(own + "in_proj.bias", optional=True), *conv]
    outputs = [f"projected.{i}", f"conv_state_out.{i}"]
    ours("MambaInProj", inputs, outputs, eps=c.norm_eps, conv_first=_conv_first(c))
    scan = [weight(own + "A"), weight(own + "D"), weight(own + "dt_bias"), f"ssm_state.{i}", lengths]
    outputs = [f"y.{i}", f"ssm_state_out.{i}"]
    gate = ""
    if c.generation == "mamba":
        ours("MambaXProj", [f"projected.{i}", weight(own + "x_proj.weight")], [f"low.{i}"])
        inputs = [f"projected.{i}", f"low.{i}", weight(own + "dt_proj.weight"), *scan]
        eps = -1.0 if c.scan_norm_eps is None else c.scan_norm_eps
        ours("MambaSelectiveUpdate", inputs, outputs, norm_eps=eps)
    else:
        limits = {"dt_min": c.dt_min, "dt_max": c.dt_max}
        ours("MambaSsdUpdate", [f"projected.{i}", *scan], outputs, dt_softplus=1, n_groups=c.n_groups, **limits)
        gate = weight(own + "norm.weight", optional=True)
    inputs = [f"y.{i}", gate, weight(own + "out_proj.weight"), weight(own + "out_proj.bias", optional=True), hidden]
    groups = c.n_groups if gate else 1
    ours("MambaOutProj", inputs, [f"hidden.{i}"], eps=c.norm_eps, n_groups=groups)
    return f"hidden.{i}"


# --- function bodies: what the operators say, in those of model.onnx and of ONNX ------------------------------------


def step_bodies(config: MambaConfig, contract: Contract, opset: int) -> list[onnx.FunctionProto]:
    """Bodies of the operators of :func:`step_graph`, and of those they are written with."""
    domains = f', "{DOMAIN}" : {VERSION}'
    if config.generation == "mamba":
        within = [conv_body, selective_scan_body]
        bodies = [_in_proj, _x_proj, _selective_update, _out_proj, _head]
    else:
        within = [conv_body, ssd_scan_body]
        bodies = [_in_proj, _ssd_update, _out_proj, _head]
    found = [parse_function(*body(config, contract), opset=opset) for body in within]
    return found + [parse_function(*body(config, contract), opset=opset, domains=domains) for body in bodies]


def _norm(source: str, result: str, eps: float, weight: str = "") -> str:
    """Text: ``result`` is the float32 ``source`` over its root mean square, times a weight."""
    text = f"""
    {result}_square = Mul ({source}, {source})
    {result}_axis = Constant <value_ints = [-1]> ()
    {result}_mean = ReduceMean <keepdims = 1> ({result}_square, {result}_axis)
    {result}_eps = Constant <value_float = {eps:.9e}> ()
    {result}_sum = Add ({result}_mean, {result}_eps)
    {result}_root = Sqrt ({result}_sum)
    """
    if not weight:
        return text + f"{result} = Div ({source}, {result}_root)\n"
    return text + f"{result}_plain = Div ({source}, {result}_root)\n{result} = Mul ({result}_plain, {weight})\n"


def _split(source: str, parts: dict[str, int]) -> str:
    names = ", ".join(parts)
    return (
        f"{source}_sizes = Constant <value_ints = [{', '.join(map(str, parts.values()))}]> ()\n"
        f"{names} = Split <axis = -1> ({source}, {source}_sizes)\n"
    )


def _product(source: str, c: MambaConfig) -> str:
    """Text: ``p`` is ``source`` times the weight, with the bias where projections have one."""
    product = f"product = MatMul ({source}, weight)\n"
    return product + ("p = Add (product, bias)\n" if c.proj_bias else "p = Identity (product)\n")


def _in_proj(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    T = element_type(contract.dtype)
    first = _conv_first(c)
    width = 2 * c.d_inner if c.generation == "mamba" else _projected(c)
    text = _norm("hidden", "normal", c.norm_eps, "norm_weight") + f"u = Cast <to = {T}> (normal)\n"
    text += _product("u", c)
    parts = {"before": first, "x": c.conv_channels, "after": width - first - c.conv_channels}
    text += _split("p", {name: size for name, size in parts.items() if size})
    text += (
        "convolved, conv_state_out = mamba_deploy.MambaCausalConv1d (x, conv_weight, conv_bias, conv_state, seq_lens)\n"
    )
    joined = ", ".join({"x": "convolved"}.get(name, name) for name, size in parts.items() if size)
    return "MambaInProj", text + f"y = Concat <axis = -1> ({joined})\n"


def _x_proj(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    return "MambaXProj", _split("x", {"own": c.d_inner, "gate": c.d_inner}) + "y = MatMul (own, weight)\n"


def _selective_update(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    names = ("dt_low", "B", "C")
    text = _split("xz", {"x": c.d_inner, "z": c.d_inner})
    sizes = dict(zip((f"{name}_raw" for name in names), (c.dt_rank, c.d_state, c.d_state), strict=True))
    text += _split("low", sizes)
    for name in names:
        if c.scan_norm_eps is None:
            text += f"{name} = Identity ({name}_raw)\n"
        else:
            text += to_float(f"{name}_raw") + _norm(f"{name}_raw_f", f"{name}_normal", c.scan_norm_eps)
            text += f"{name} = Cast <to = {element_type(contract.dtype)}> ({name}_normal)\n"
    text += "dt = MatMul (dt_low, dt_weight)\n"
    text += "y, ssm_state_out = mamba_deploy.MambaSelectiveScan (x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens)\n"
    return "MambaSelectiveUpdate", text


def _ssd_update(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    states = c.n_groups * c.d_state
    parts = {"z": c.d_inner, "x": c.d_inner, "B": states, "C": states, "dt": c.n_heads}
    text = _split("projected", parts)
    text += "scanned, ssm_state_out = mamba_deploy.MambaSsdScan (x, dt, A, B, C, D, dt_bias, ssm_state, seq_lens)\n"
    text += to_float("scanned") + to_float("z") + "gate = Sigmoid (z_f)\nsilu = Mul (z_f, gate)\n"
    return (
        "MambaSsdUpdate",
        text + f"gated = Mul (scanned_f, silu)\ny = Cast <to = {element_type(contract.dtype)}> (gated)\n",
    )


def _out_proj(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    text, u = "", "x"
    if c.generation == "mamba2" and c.gated_norm:
        G = c.n_groups
        text += (
            to_float("x")
            + f"""
        grouped_shape = Constant <value_ints = [0, 0, {G}, {c.d_inner // G}]> ()
        flat_shape = Constant <value_ints = [0, 0, {c.d_inner}]> ()
        grouped = Reshape (x_f, grouped_shape)
        """
        )
        text += _norm("grouped", "normal", c.norm_eps) + "flat = Reshape (normal, flat_shape)\n"
        text += f"weighted = Mul (flat, norm_weight)\nu = Cast <to = {element_type(contract.dtype)}> (weighted)\n"
        u = "u"
    text += _product(u, c)
    return "MambaOutProj", text + to_float("p") + "y = Add (residual, p_f)\n"


def _head(c: MambaConfig, contract: Contract) -> tuple[str, str]:
    text = _norm("hidden", "normal", c.norm_eps, "norm_weight")
    text += f"u = Cast <to = {element_type(contract.dtype)}> (normal)\n"
    text += "columns = Transpose <perm = [1, 0]> (weight)\nproduct = MatMul (u, columns)\n" + to_float("product")
    return "MambaHead", text + "seq = Constant <value_ints = [1]> ()\ny = Squeeze (product_f, seq)\n"
