"""model.onnx -> model.cpu.onnx: the same weights file, the custom ops replaced by what runs fastest on a CPU.

Measured on two AVX-512 cores, ONNX Runtime 1.31, one layer of the 130M models:

- MambaSsdScan: the contrib op ``LinearAttention``, 512 tokens in 4.2 ms. It wants the state
  transposed; for one token the roles of its key and value are swapped instead, which updates the state as it
  lies: 37 us a token rather than 104.
- MambaSelectiveScan: the portable body, 8 ms for 512 tokens. ``LinearAttention`` would need the decay of every
  channel and state materialised, 48 MiB a layer.
- MambaCausalConv1d: the portable body, 1.1 ms for 512 tokens; ``CausalConvWithState``: 2.7 ms.

ONNX Runtime has no bfloat16 products on a CPU and casts float16 weights again in every run, so a half-precision graph
is widened to float32: weights once at loading, states at the edges, where the contract keeps its dtypes.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir
from onnx_ir.passes import common

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.exporters.functions import parse_function, ssd_inputs, ssd_outputs

__all__ = ["lower_for_cpu"]

_CONTRIB = "com.microsoft"


def lower_for_cpu(portable: Path, lowered: Path, config: MambaConfig, contract: Contract) -> None:
    """Write the CPU graph of an exported model.

    Args:
        portable: ``model.onnx``.
        lowered: ``model.cpu.onnx``, in the same directory: it points to the same weights.
        config: The architecture.
        contract: The dtypes of the graph.
    """
    model = onnx_ir.load(portable)
    opset = model.opset_imports[""]
    if config.generation == "mamba2":
        body = parse_function(*_ssd_scan_body(config, contract), opset=opset, domains=f', "{_CONTRIB}" : 1')
        function = onnx_ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
    for function in model.functions.values():  # or inlining counts through all nodes without a name for each of them
        for node in function.all_nodes():
            node.name = node.name or f"node_{node.outputs[0].name}"
    common.InlinePass()(model)
    common.IdentityEliminationPass()(model)  # ONNX Runtime copies a state that goes out through one
    _count_tokens_once(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    if contract.dtype != "float32":
        _widen(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    onnx_ir.save(model, lowered)


def _count_tokens_once(graph: onnx_ir.Graph) -> None:
    """Each body asks its x [B, L, ...] for L: with one answer for all, which tokens are used is found once too."""
    asked = [node for node in graph if str(node.outputs[0].name).startswith("length_1d")]
    for node in asked[1:]:
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], asked[0].outputs[0])
        graph.remove(node, safe=True)


def _ssd_scan_body(config: MambaConfig, contract: Contract) -> tuple[str, str]:
    """MambaSsdScan through LinearAttention with the rule ``gated``: S' = exp(decay) S + key value^T, o = query^T S'."""
    H, P, N, G = config.n_heads, config.head_dim, config.d_state, config.n_groups
    S = H // G
    attention = f'{_CONTRIB}.LinearAttention <kv_num_heads = {H}, scale = 1.0, update_rule = "gated", q_num_heads'
    text = (
        ssd_inputs(config, contract)
        + f"""
    grouped = Constant <value_ints = [0, 0, {G}, 1, {N}]> ()
    repeats = Constant <value_ints = [1, 1, 1, {S}, 1]> ()
    per_head = Constant <value_ints = [0, 0, {H * N}]> ()
    B_groups = Reshape (B_masked, grouped)
    B_repeated = Expand (B_groups, repeats)
    B_heads = Reshape (B_repeated, per_head)
    single_1d = Equal (length_1d, axis_1)
    single = Squeeze (single_1d)
    y_scan, last = If <
        then_branch = ssd_one_token () => (float[batch, 1, {H * P}] y_one, float[batch, {H}, {P}, {N}] last_one) {{
            unused, last_one = {attention} = {H}> (drive, drive, B_heads, state_f, log_decay)
            state_groups = Constant <value_ints = [0, {G}, {S}, {P}, {N}]> ()
            C_columns = Constant <value_ints = [0, {G}, 1, {N}, 1]> ()
            y_row = Constant <value_ints = [0, 1, {H * P}]> ()
            last_groups = Reshape (last_one, state_groups)
            C_groups = Reshape (C_masked, C_columns)
            y_groups = MatMul (last_groups, C_groups)
            y_one = Reshape (y_groups, y_row)
        }},
        else_branch = ssd_prompt () => (float[batch, seq, {H * P}] y_prompt, float[batch, {H}, {P}, {N}] last_prompt) {{
            C_repeats = Constant <value_ints = [1, 1, 1, {S}, 1]> ()
            C_split = Reshape (C_masked, grouped)
            C_repeated = Expand (C_split, C_repeats)
            C_heads = Reshape (C_repeated, per_head)
            state_np = Transpose <perm = [0, 1, 3, 2]> (state_f)
            y_prompt, last_np = {attention} = {H}> (C_heads, B_heads, drive, state_np, log_decay)
            last_prompt = Transpose <perm = [0, 1, 3, 2]> (last_np)
        }}> (single)
    """
    )
    return "MambaSsdScan", text + ssd_outputs(config, contract)


def _widen(graph: onnx_ir.Graph) -> None:
    """Compute in float32 what the graph computes in float16 or bfloat16; its inputs and outputs keep their dtypes."""
    narrow = {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16}
    wide = onnx_ir.DataType.FLOAT
    outputs = set(graph.outputs)
    for value in [*graph.initializers.values(), *graph.inputs]:
        if value.dtype in narrow:
            uses = [use for use in value.uses() if use.node.op_type != "Cast"]
            cast = _cast(value, wide, f"{value.name}_f32")
            for node, index in uses:
                node.replace_input_with(index, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for node in graph:
        if outputs.intersection(node.outputs):
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() in narrow:
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(wide))
        for value in node.outputs:
            if value.dtype in narrow:
                value.dtype = wide
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.dtype in narrow and producer is not None and producer.op_type != "Cast":
            value_dtype = value.dtype
            value.dtype, name = wide, value.name
            value.name = f"{name}_f32"
            cast = _cast(value, value_dtype, str(name))
            cast.outputs[0].shape = value.shape
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _cast(value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    node = onnx_ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast_{name}")
    node.outputs[0].name, node.outputs[0].dtype = name, dtype
    return node
