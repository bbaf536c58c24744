"""The custom ops on the ONNX side: schemas, and function bodies that let stock ONNX Runtime run them.

The schemas are those of ``plugins/rules.py``: domain ``mamba_deploy``, token-major, optional inputs in place. A body
is written for one model (its K, N, H, which optional inputs it has) and one opset, as ONNX text. A TensorRT plugin of
the same name takes the place of a body.

In every body row b uses its first ``seq_lens[b]`` tokens, and what stands past them is masked before it can reach a
state, NaN included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
from onnx.defs import OpSchema

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.plugins.rules import DOMAIN, OPS, Tensor

__all__ = ["DOMAIN", "OP_ATTRIBUTES", "PLUGIN", "VERSION", "function_bodies", "input_names", "register_schemas"]

VERSION = 1

_ACTIVATION = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_LETTERS = {"float32": "F", "int32": "I"}  # T and S stand for themselves
_ATTRIBUTE = {str: OpSchema.AttrType.STRING, int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
PLUGIN = {"plugin_version": "1", "plugin_namespace": ""}  # by which TensorRT finds the plugin of a node
OP_ATTRIBUTES = {
    op: {name: _ATTRIBUTE[type(value)] for name, value in {**rule.attributes, **PLUGIN}.items()}
    for op, rule in OPS.items()
}


def input_names(op: str) -> list[str]:
    """Input names of a custom op, in order; optional ones among them."""
    return [tensor.name for tensor in OPS[op].inputs]


@functools.cache
def register_schemas() -> None:
    """Make the ops known to ``onnx`` in this process, for its checker and for onnxscript."""
    constraints = {
        "T": ("T", _ACTIVATION, "activations"),
        "S": ("S", _ACTIVATION, "state"),
        "F": ("F", ["tensor(float)"], "parameters kept in float32"),
        "I": ("I", ["tensor(int32)"], "lengths"),
    }
    for op, rule in OPS.items():
        if rule.layer_inputs:
            continue  # no file has it
        used = {_letter(tensor) for tensor in (*rule.inputs, *rule.outputs)}
        onnx.defs.register_schema(
            OpSchema(
                op,
                DOMAIN,
                VERSION,
                inputs=[_parameter(tensor) for tensor in rule.inputs],
                outputs=[_parameter(tensor) for tensor in rule.outputs],
                type_constraints=[constraints[letter] for letter in sorted(used)],
                attributes=[OpSchema.Attribute(n, t, "", required=False) for n, t in OP_ATTRIBUTES[op].items()],
            )
        )


def _letter(tensor: Tensor) -> str:
    return _LETTERS.get(tensor.dtype, tensor.dtype)


def _parameter(tensor: Tensor) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption
    kind = option.Optional if tensor.optional else option.Single
    return OpSchema.FormalParameter(tensor.name, _letter(tensor), param_option=kind)


def function_bodies(config: MambaConfig, contract: Contract, opset: int) -> list[onnx.FunctionProto]:
    """Bodies of the ops that a model uses, in standard ONNX operators.

    Args:
        config: The architecture; sizes and optional inputs are written into the bodies.
        contract: Activation and state dtypes.
        opset: The opset of the model; the checker wants it to be the bodies' own.
    """
    scan = selective_scan_body if config.generation == "mamba" else ssd_scan_body
    bodies: list[Callable[[MambaConfig, Contract], tuple[str, str]]] = [conv_body, scan, last_token_body]
    return [parse_function(*body(config, contract), opset=opset) for body in bodies]


def parse_function(op: str, body: str, *, opset: int, domains: str = "") -> onnx.FunctionProto:
    """A FunctionProto from ONNX text; ``domains`` are further opset imports."""
    attributes = ", ".join(OP_ATTRIBUTES[op])
    outputs = ", ".join(tensor.name for tensor in OPS[op].outputs)
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{domains}]>\n'
        f"{op} <{attributes}> ({', '.join(input_names(op))}) => ({outputs}) {{\n{body}\n}}"
    )


def element_type(dtype: str) -> int:
    """ONNX's number of a dtype."""
    return int(onnx.TensorProto.DataType.Value({"float32": "FLOAT"}.get(dtype, dtype.upper())))


# --- text shared by the bodies ------------------------------------------------------------------------------------

_VALID = """
axis_1 = Constant <value_ints = [1]> ()
axis_2 = Constant <value_ints = [2]> ()
first = Constant <value_int = 0> ()
one = Constant <value_int = 1> ()
zero = Constant <value_float = 0.0> ()
length_1d = Shape <start = 1, end = 2> (x)
length = Squeeze (length_1d)
positions = Range (first, length, one)
lens = Cast <to = 7> (seq_lens)
lens_column = Unsqueeze (lens, axis_1)
valid_2d = Less (positions, lens_column)
valid = Unsqueeze (valid_2d, axis_2)
"""


def _cast(name: str, source: str, dtype: str, to: str) -> str:
    """Text: ``name`` is ``source``, which has a dtype, in another; ONNX Runtime copies what it casts to what it was."""
    return f"{name} = " + (f"Identity ({source})\n" if dtype == to else f"Cast <to = {element_type(to)}> ({source})\n")


def _to_float(name: str, dtype: str) -> str:
    """Text: ``name_f`` is ``name`` as float32."""
    return _cast(f"{name}_f", name, dtype, "float32")


def _masked(name: str, source: str) -> str:
    return f"{name} = Where (valid, {source}, zero)\n"


def _result(source: str, contract: Contract) -> str:
    """Text: the output ``y`` is ``source``, zero past a row's end."""
    return _masked("y_f", source) + _cast("y", "y_f", "float32", contract.dtype)


def _masked_key(width: int) -> str:
    """Text: ``B_masked`` is B, and -0.0 past a row's end, where delta * x is 0: h + -0.0 keeps every bit of h, h + 0.0
    does not. A vector of B's width, because ONNX Runtime's Where loses the sign of a scalar -0.0.
    """
    minus_zeros = ", ".join(["-0.0"] * width)
    return f"nothing = Constant <value_floats = [{minus_zeros}]> ()\nB_masked = Where (valid, B_f, nothing)\n"


def _step_size(softplus: bool, config: MambaConfig, contract: Contract) -> str:
    """Text: ``delta`` [B, L, ...] from ``dt`` and ``dt_bias``, zero past a row's end.

    Softplus as max(v, 0) + log1p(exp(-|v|)), with log1p(e) = e log(u) / (u - 1) for u = 1 + e rounded (Kahan):
    log(1 + e) alone loses all digits of a small step.
    """
    text = _to_float("dt", contract.dtype) + "biased = Add (dt_f, dt_bias)\n"
    delta = "biased"
    if softplus:
        text += """
        unit = Constant <value_float = 1.0> ()
        magnitude = Abs (biased)
        opposite = Neg (magnitude)
        small = Exp (opposite)
        above_one = Add (unit, small)
        rounded = Sub (above_one, unit)
        logarithm = Log (above_one)
        scaled = Mul (small, logarithm)
        ratio = Div (scaled, rounded)
        lost = Equal (rounded, zero)
        log1p = Where (lost, small, ratio)
        positive = Relu (biased)
        softplus = Add (positive, log1p)
        """
        delta = "softplus"
    if config.dt_min > 0.0 or config.dt_max < float("inf"):
        upper = f"high = Constant <value_float = {_float(config.dt_max)}> ()\nbelow = Min ({delta}, high)\n"
        text += upper if config.dt_max < float("inf") else f"below = Identity ({delta})\n"
        text += f"low = Constant <value_float = {_float(config.dt_min)}> ()\nlimited = Max (below, low)\n"
        delta = "limited"
    return text + _masked("delta", delta)


def _float(value: float) -> str:
    """A float as ONNX text reads it: with a point, and the digits that tell two float32 apart."""
    return f"{value:.9e}"


# --- the bodies ---------------------------------------------------------------------------------------------------


def conv_body(config: MambaConfig, contract: Contract) -> tuple[str, str]:
    """MambaCausalConv1d as K shifted products: on a CPU faster than a grouped Conv, and without transposes."""
    K = config.d_conv
    text = _VALID + "past = Transpose <perm = [0, 2, 1]> (conv_state)\nwindow = Concat <axis = 1> (past, x)\n"
    text += _to_float("window", contract.dtype) + _to_float("weight", contract.dtype)
    text += "by_tap = Transpose <perm = [1, 0]> (weight_f)\n"
    text += f"{', '.join(f'tap{k}' for k in range(K))} = Split <axis = 0, num_outputs = {K}> (by_tap)\n"
    for k in range(K):
        if k < K - 1:
            text += f"start{k} = Constant <value_ints = [{k}]> ()\nend{k} = Constant <value_ints = [{k - K + 1}]> ()\n"
            text += f"shifted{k} = Slice (window_f, start{k}, end{k}, axis_1)\n"
        else:
            text += _to_float("x", contract.dtype) + f"shifted{k} = Identity (x_f)\n"
        text += f"product{k} = Mul (shifted{k}, tap{k})\n"
        text += f"sum{k} = Add (sum{k - 1}, product{k})\n" if k else "sum0 = Identity (product0)\n"
    result = f"sum{K - 1}"
    if config.conv_bias:
        text += _to_float("bias", contract.dtype) + f"with_bias = Add ({result}, bias_f)\n"
        result = "with_bias"
    text += f"gate = Sigmoid ({result})\nactivated = Mul ({result}, gate)\n"
    text += _result("activated", contract)
    offsets = ", ".join(str(k) for k in range(K - 1))
    text += f"""
    offsets = Constant <value_ints = [{offsets}]> ()
    newest = Add (lens_column, offsets)
    newest_3d = Unsqueeze (newest, axis_2)
    kept = GatherND <batch_dims = 1> (window, newest_3d)
    conv_state_out = Transpose <perm = [0, 2, 1]> (kept)
    """
    return "MambaCausalConv1d", text


def selective_scan_body(config: MambaConfig, contract: Contract) -> tuple[str, str]:
    """MambaSelectiveScan as a Scan over time with the state transposed to [B, N, D].

    So every product of the loop runs along D: on a CPU 2.2 times faster than [B, D, N], a little faster than blocks
    of unrolled tokens.
    """
    D, N = config.d_inner, config.d_state
    text = _VALID + _step_size(True, config, contract)
    text += "".join(_to_float(name, contract.dtype) for name in ("x", "B", "C", "z"))
    text += _cast("state_f", "ssm_state", contract.state_dtype, "float32")
    text += "drive_all = Mul (delta, x_f)\n" + _masked("drive_3d", "drive_all") + _masked_key(N)
    text += "C_masked = Where (valid, C_f, zero)\n"
    text += f"""
    state_nd = Transpose <perm = [0, 2, 1]> (state_f)
    A_nd = Transpose <perm = [1, 0]> (A)
    axis_3 = Constant <value_ints = [3]> ()
    delta_4d = Unsqueeze (delta, axis_2)
    drive_4d = Unsqueeze (drive_3d, axis_2)
    B_4d = Unsqueeze (B_masked, axis_3)
    C_4d = Unsqueeze (C_masked, axis_2)
    last_nd, y_4d = Scan <num_scan_inputs = 4, scan_input_axes = [1, 1, 1, 1], scan_output_axes = [1],
        body = selective_scan_token (float[batch, {N}, {D}] h, float[batch, 1, {D}] delta_t,
            float[batch, 1, {D}] drive_t, float[batch, {N}, 1] B_t, float[batch, 1, {N}] C_t)
            => (float[batch, {N}, {D}] h_next, float[batch, 1, {D}] y_t) {{
            exponent = Mul (delta_t, A_nd)
            decay = Exp (exponent)
            drive = Mul (drive_t, B_t)
            kept = Mul (decay, h)
            h_next = Add (kept, drive)
            y_t = MatMul (C_t, h_next)
        }}> (state_nd, delta_4d, drive_4d, B_4d, C_4d)
    last_dn = Transpose <perm = [0, 2, 1]> (last_nd)
    y_scan = Squeeze (y_4d, axis_2)
    skip = Mul (D, x_f)
    y_skip = Add (y_scan, skip)
    gate = Sigmoid (z_f)
    silu = Mul (z_f, gate)
    y_gated = Mul (y_skip, silu)
    """
    text += _cast("ssm_state_out", "last_dn", "float32", contract.state_dtype)
    return "MambaSelectiveScan", text + _result("y_gated", contract)


def ssd_inputs(config: MambaConfig, contract: Contract) -> str:
    """Text shared by the bodies of MambaSsdScan: ``log_decay`` [B, L, H], ``drive`` [B, L, H P], B and C in float32."""
    H, P = config.n_heads, config.head_dim
    text = _VALID + _step_size(True, config, contract)
    text += "".join(_to_float(name, contract.dtype) for name in ("x", "B", "C"))
    text += _cast("state_f", "ssm_state", contract.state_dtype, "float32")
    text += _masked_key(config.n_groups * config.d_state) + _masked("C_masked", "C_f") + _masked("x_masked", "x_f")
    return (
        text
        + f"""
    log_decay = Mul (delta, A)
    head_shape = Constant <value_ints = [0, 0, {H}, {P}]> ()
    flat_shape = Constant <value_ints = [0, 0, {H * P}]> ()
    x_heads = Reshape (x_masked, head_shape)
    axis_3 = Constant <value_ints = [3]> ()
    delta_heads = Unsqueeze (delta, axis_3)
    drive_heads = Mul (x_heads, delta_heads)
    drive = Reshape (drive_heads, flat_shape)
    """
    )


def ssd_outputs(config: MambaConfig, contract: Contract) -> str:
    """Text shared by the bodies of MambaSsdScan: the outputs from ``y_scan`` [B, L, H P] and ``last``."""
    H, P = config.n_heads, config.head_dim
    return (
        f"""
    skip_shape = Constant <value_ints = [{H}, {P if config.d_has_hdim else 1}]> ()
    D_heads = Reshape (D, skip_shape)
    skip_heads = Mul (D_heads, x_heads)
    skip = Reshape (skip_heads, flat_shape)
    y_skip = Add (y_scan, skip)
    """
        + _cast("ssm_state_out", "last", "float32", contract.state_dtype)
        + _result("y_skip", contract)
    )


def ssd_scan_body(config: MambaConfig, contract: Contract) -> tuple[str, str]:
    """MambaSsdScan as a Scan over time, the state seen as [B, G, H / G, P, N]."""
    H, P, N, G = config.n_heads, config.head_dim, config.d_state, config.n_groups
    S = H // G
    text = (
        ssd_inputs(config, contract)
        + f"""
    grouped_state = Constant <value_ints = [0, {G}, {S}, {P}, {N}]> ()
    plain_state = Constant <value_ints = [0, {H}, {P}, {N}]> ()
    per_head = Constant <value_ints = [0, 0, {G}, {S}, 1, 1]> ()
    per_channel = Constant <value_ints = [0, 0, {G}, {S}, {P}, 1]> ()
    per_group_row = Constant <value_ints = [0, 0, {G}, 1, 1, {N}]> ()
    per_group_column = Constant <value_ints = [0, 0, {G}, 1, {N}, 1]> ()
    h_first = Reshape (state_f, grouped_state)
    log_decay_all = Reshape (log_decay, per_head)
    drive_all = Reshape (drive, per_channel)
    B_all = Reshape (B_masked, per_group_row)
    C_all = Reshape (C_masked, per_group_column)
    h_last, y_all = Scan <num_scan_inputs = 4, scan_input_axes = [1, 1, 1, 1], scan_output_axes = [1],
        body = ssd_token (float[batch, {G}, {S}, {P}, {N}] h, float[batch, {G}, {S}, 1, 1] log_decay_t,
                          float[batch, {G}, {S}, {P}, 1] drive_t, float[batch, {G}, 1, 1, {N}] B_t,
                          float[batch, {G}, 1, {N}, 1] C_t)
            => (float[batch, {G}, {S}, {P}, {N}] h_next, float[batch, {G}, {S}, {P}, 1] y_t) {{
            decay = Exp (log_decay_t)
            new = Mul (drive_t, B_t)
            kept = Mul (decay, h)
            h_next = Add (kept, new)
            y_t = MatMul (h_next, C_t)
        }}> (h_first, log_decay_all, drive_all, B_all, C_all)
    last = Reshape (h_last, plain_state)
    y_scan = Reshape (y_all, flat_shape)
    """
    )
    return "MambaSsdScan", text + ssd_outputs(config, contract)


def last_token_body(config: MambaConfig, contract: Contract) -> tuple[str, str]:
    """MambaLastToken as a gather; always of the float32 residual stream, or of float32 logits."""
    return (
        "MambaLastToken",
        """
    axis_1 = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    nothing = Constant <value_float = 0.0> ()
    lens = Cast <to = 7> (seq_lens)
    before = Sub (lens, one)
    last = Max (before, zero)
    last_column = Unsqueeze (last, axis_1)
    picked = GatherND <batch_dims = 1> (x, last_column)
    used = Greater (lens, zero)
    used_column = Unsqueeze (used, axis_1)
    y = Where (used_column, picked, nothing)
    """,
    )
