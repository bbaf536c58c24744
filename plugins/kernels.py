"""The CUDA kernels from Python: ctypes over the C interface of ``mamba_kernels.h``, arguments in the order of the ops.

Arrays are anything on the device with ``__cuda_array_interface__`` (pycuda, cupy) or torch CUDA tensors. Calls only
enqueue work: keep every array until the stream has come past it. Nothing is allocated, so the caller brings the
outputs and, where :meth:`Kernels.workspace_bytes` asks for it, scratch memory.

    kernels = load()
    kernels.last_token(x, seq_lens, y=y, stream=stream.handle)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_void_p
from pathlib import Path
from typing import Any

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins.arguments import (
    INT32_MAX,
    SIGNATURES,
    Argument,
    as_workspace,
    check_dtype_name,
    check_sizes,
    checked,
    model_arguments,
)
from mamba_deploy.plugins.arrays import Array, as_array, check_devices, check_overlap, stream_handle
from mamba_deploy.plugins.pending import pending_row
from mamba_deploy.plugins.rules import OPS
from mamba_deploy.plugins.structs import ACTIVATIONS, DTYPES, MambaLayer, MambaModel, pointers

__all__ = ["Kernels", "RuntimeKernels", "load"]

# What a launch can answer: static libcudart, which the library holds, keeps its cudaGetErrorName to itself.
CUDA_ERRORS = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    3: "cudaErrorInitializationError",
    9: "cudaErrorInvalidConfiguration",
    35: "cudaErrorInsufficientDriver",
    98: "cudaErrorInvalidDeviceFunction",
    100: "cudaErrorNoDevice",
    101: "cudaErrorInvalidDevice",
    200: "cudaErrorInvalidKernelImage",
    201: "cudaErrorDeviceUninitialized",
    209: "cudaErrorNoKernelImageForDevice",
    222: "cudaErrorUnsupportedPtxVersion",
    400: "cudaErrorInvalidResourceHandle",
    700: "cudaErrorIllegalAddress",
    701: "cudaErrorLaunchOutOfResources",
    702: "cudaErrorLaunchTimeout",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    719: "cudaErrorLaunchFailure",
    801: "cudaErrorNotSupported",
    802: "cudaErrorSystemNotReady",
    803: "cudaErrorSystemDriverMismatch",
    900: "cudaErrorStreamCaptureUnsupported",
    901: "cudaErrorStreamCaptureInvalidated",
    999: "cudaErrorUnknown",
}
_REBUILD = "build it for this GPU: mamba-deploy plugin build --force"
_ERROR_HINTS = {
    98: _REBUILD,
    100: "the kernels need an NVIDIA GPU and its driver",
    200: _REBUILD,
    209: _REBUILD,
    222: "the driver is older than the CUDA toolkit that compiled the library: " + _REBUILD,
    303: "libcublas was not found: pip install nvidia-cublas-cu12, or install the libraries of CUDA",
    35: "the driver is older than the CUDA toolkit that compiled the library",
    400: "the stream and the arrays must belong to the current device and its primary context",
    700: "an earlier kernel may have caused this: compute-sanitizer finds it; the process must be started again",
}


class Kernels:
    """A loaded library of the kernels. Arguments are those of the ops in ``mamba_deploy.ops``, which define them.

    Of every call: the outputs ``y`` and ``state_out`` are arrays of the caller, ``state_out`` the state itself or
    memory apart from it; ``workspace`` is a device array or (pointer, bytes), needed where :meth:`workspace_bytes` is
    not 0; ``stream`` is a number or a stream of pycuda, torch or cupy. ``dtype`` is that of x and need not be said, but
    where 16-bit integers hold bfloat16. The values in ``seq_lens`` are not checked: they are on the device.

    Every method raises :class:`PluginError`, naming the argument, when a shape, dtype, layout, address or device is not
    what the kernel takes, or when CUDA refuses the launch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise PluginError(
                f"the kernels library {path} cannot be loaded: {error}", hint="mamba-deploy plugin build --kernels-only"
            ) from error
        functions: list[tuple[str, list[Any], Any]] = [
            ("mamba_pending_row", [ctypes.POINTER(MambaModel)], ctypes.c_int32)
        ]
        for name, op in SIGNATURES.items():
            functions += [
                (f"mamba_{name}", [ctypes.POINTER(op.struct), c_void_p, c_void_p], ctypes.c_int),
                (f"mamba_{name}_workspace", [ctypes.POINTER(op.struct)], ctypes.c_size_t),
            ]
        for symbol, taken, result in functions:
            function = getattr(self._library, symbol, None)
            if function is None:
                raise PluginError(f"{path} is not a library of the kernels: it has no function {symbol}")
            function.argtypes, function.restype = taken, result

    def causal_conv1d(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        conv_state: Any,
        seq_lens: Any,
        activation: str = "silu",
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
    ) -> None:
        """``ops.causal_conv1d``: x [B, L, C], weight [C, K], bias [C] or None, conv_state [B, C, K-1], seq_lens [B]."""
        if activation not in ACTIVATIONS:
            raise PluginError(f"activation is {activation!r}: expected 'silu' or 'none'")
        arrays = (x, weight, bias, conv_state, seq_lens, y, state_out)
        constants = {"activation": ACTIVATIONS[activation]}
        self._run("causal_conv1d", arrays, constants, workspace, stream, dtype)

    def selective_scan(
        self,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        z: Any,
        dt_bias: Any,
        ssm_state: Any,
        seq_lens: Any,
        dt_softplus: bool = True,
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        """``ops.selective_scan``: x, dt and z [B, L, D], A [D, N], B and C [B, L, N], D and dt_bias [D],
        ssm_state [B, D, N], seq_lens [B]; D, z and dt_bias may be None.
        """
        arrays = (x, dt, A, B, C, D, z, dt_bias, ssm_state, seq_lens, y, state_out)
        constants = {"dt_softplus": int(dt_softplus)}
        self._run("selective_scan", arrays, constants, workspace, stream, dtype, state_dtype)

    def ssd_scan(
        self,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        dt_bias: Any,
        ssm_state: Any,
        seq_lens: Any,
        dt_softplus: bool = True,
        dt_min: float = 0.0,
        dt_max: float = math.inf,
        n_groups: int = 1,
        chunk_size: int = 256,
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        """``ops.ssd_scan``: x [B, L, H*P], dt [B, L, H], A and dt_bias [H], B and C [B, L, G*N], D [H] or [H, P],
        ssm_state [B, H, P, N], seq_lens [B]; D and dt_bias may be None. The kernels choose their own chunk size.
        """
        if not dt_min <= dt_max:
            raise PluginError(f"dt_min is {dt_min} and dt_max is {dt_max}: expected dt_min <= dt_max")
        for name, value in (("n_groups", n_groups), ("chunk_size", chunk_size)):
            if value < 1:
                raise PluginError(f"{name} is {value}: expected at least 1")
        arrays = (x, dt, A, B, C, D, dt_bias, ssm_state, seq_lens, y, state_out)
        constants = {
            "groups": n_groups,
            "dt_softplus": int(dt_softplus),
            "dt_min": dt_min,
            "dt_max": dt_max,
            "skip_per_channel": int(D is not None and len(as_array("D", D).shape) == 2),
        }
        self._run("ssd_scan", arrays, constants, workspace, stream, dtype, state_dtype)

    def last_token(
        self, x: Any, seq_lens: Any, *, y: Any, workspace: Any = None, stream: Any = 0, dtype: str | None = None
    ) -> None:
        """``ops.last_token``: x [B, L, d], seq_lens [B], y [B, d]."""
        self._run("last_token", (x, seq_lens, y), {}, workspace, stream, dtype)

    # --- the parts of a decode step, L = 1

    def in_proj(
        self,
        hidden: Any,
        norm_weight: Any,
        weight: Any,
        bias: Any,
        conv_weight: Any,
        conv_bias: Any,
        conv_state: Any,
        seq_lens: Any,
        eps: float = 1e-5,
        conv_first: int = 0,
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
    ) -> None:
        """``y = norm(hidden) W + bias``, and of the columns from ``conv_first`` on their causal convolution with silu.

        hidden float32 [B, 1, d], norm_weight float32 [d], weight [d, M], bias [M] or None, conv_weight [C, K],
        conv_bias [C] or None, conv_state [B, C, K-1], seq_lens [B], y [B, 1, M].
        """
        arrays = (hidden, norm_weight, weight, bias, conv_weight, conv_bias, conv_state, seq_lens, y, state_out)
        self._run("in_proj", arrays, {"eps": eps, "conv_first": conv_first}, workspace, stream, dtype)

    def x_proj(
        self, x: Any, weight: Any, *, y: Any, workspace: Any = None, stream: Any = 0, dtype: str | None = None
    ) -> None:
        """``y = x[..., :D] W``: x [B, 1, X], weight [D, E], y [B, 1, E]."""
        self._run("x_proj", (x, weight, y), {}, workspace, stream, dtype)

    def selective_update(
        self,
        xz: Any,
        low: Any,
        dt_weight: Any,
        A: Any,
        D: Any,
        dt_bias: Any,
        ssm_state: Any,
        seq_lens: Any,
        norm_eps: float = -1.0,
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        """``ops.selective_scan`` of one token with dt = low W in it. x and z are a row of xz [B, 1, 2 D], x convolved;
        dt's input, B and C one of low [B, 1, R + 2 N]; dt_weight [R, D], A [D, N], D and dt_bias [D] or None, ssm_state
        [B, D, N], seq_lens [B], y [B, 1, D]. norm_eps is that of a norm of each part of low, negative for none.
        """
        arrays = (xz, low, dt_weight, A, D, dt_bias, ssm_state, seq_lens, y, state_out)
        self._run("selective_update", arrays, {"norm_eps": norm_eps}, workspace, stream, dtype, state_dtype)

    def ssd_update(
        self,
        projected: Any,
        A: Any,
        D: Any,
        dt_bias: Any,
        ssm_state: Any,
        seq_lens: Any,
        dt_softplus: bool = True,
        dt_min: float = 0.0,
        dt_max: float = math.inf,
        n_groups: int = 1,
        *,
        y: Any,
        state_out: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        """``ops.ssd_scan`` of one token times silu(z): projected [B, 1, M] holds z, x, B, C and dt side by side, x, B
        and C convolved; A and dt_bias [H], D [H] or [H, P], ssm_state [B, H, P, N], seq_lens [B], y [B, 1, H*P].
        """
        constants = {
            "groups": n_groups,
            "dt_softplus": int(dt_softplus),
            "dt_min": dt_min,
            "dt_max": dt_max,
            "skip_per_channel": int(D is not None and len(as_array("D", D).shape) == 2),
        }
        arrays = (projected, A, D, dt_bias, ssm_state, seq_lens, y, state_out)
        self._run("ssd_update", arrays, constants, workspace, stream, dtype, state_dtype)

    def out_proj(
        self,
        x: Any,
        norm_weight: Any,
        weight: Any,
        bias: Any,
        residual: Any,
        eps: float = 1e-5,
        n_groups: int = 1,
        *,
        y: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
    ) -> None:
        """``y = residual + norm(x) W + bias``, the norm in groups; without norm_weight x itself.

        x [B, 1, D], norm_weight float32 [D] or None, weight [D, d], bias [d] or None, residual and y float32 [B, 1, d].
        """
        arrays = (x, norm_weight, weight, bias, residual, y)
        self._run("out_proj", arrays, {"eps": eps, "groups": n_groups}, workspace, stream, dtype)

    def head(
        self,
        hidden: Any,
        norm_weight: Any,
        weight: Any,
        eps: float = 1e-5,
        *,
        y: Any,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
    ) -> None:
        """``y = norm(hidden) W^T``: hidden float32 [B, 1, d], norm_weight float32 [d], weight [V, d], y float32
        [B, V].
        """
        self._run("head", (hidden, norm_weight, weight, y), {"eps": eps}, workspace, stream, dtype)

    # --- a whole model

    def model(
        self,
        input_ids: Any,
        seq_lens: Any,
        embedding: Any,
        norm_weight: Any,
        head: Any,
        layers: Sequence[Mapping[str, Any]],
        eps: float = 1e-5,
        norm_eps: float = -1.0,
        dt_min: float = 0.0,
        dt_max: float = math.inf,
        n_groups: int = 1,
        *,
        logits: Any,
        pending: Any = None,
        pending_out: Any = None,
        workspace: Any = None,
        stream: Any = 0,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        """Tokens to logits.

        Args:
            input_ids: int32 [B, L].
            seq_lens: int32 [B].
            embedding: [V, d].
            norm_weight: float32 [d], of the last norm.
            head: [V, d], or None where it is the embedding.
            layers: Of each layer its arrays by their names in ``MambaLayer``; what may be null may be absent or None.
                Mamba has x_proj and dt_proj, Mamba-2 has not. A state may go out where it came in.
            eps: Of the norms.
            norm_eps: Of Falcon-Mamba's norms in the scan; negative: none.
            dt_min: As in :meth:`ssd_scan`, like the next two; Mamba-2 alone.
            dt_max: Upper limit.
            n_groups: G.
            logits: float32 [B, V], at the last token that each row uses, or [B, L, V]. NaN where, in the one kernel
                for a row's token on compute capability 9.0, below d 2048, a block's share of a sum is 65536 or more.
            pending: Mamba-2 alone; float32 [B, :meth:`pending_row`], zeros at first: tokens that ssm_state does not
                hold yet. With it a step whose states go out where they came in may write ssm_state once in a few
                tokens: it is part of the state from then on. None: ssm_state holds all tokens.
            pending_out: Where it goes out; None: where it came in.
            workspace: As in every call, like the next three; dtype is that of the embedding.
            stream: A number or a stream.
            dtype: float32, float16 or bfloat16.
            state_dtype: Of ssm_state.
        """
        if not layers:
            raise PluginError("layers is empty: expected at least one")
        if not dt_min <= dt_max:
            raise PluginError(f"dt_min is {dt_min} and dt_max is {dt_max}: expected dt_min <= dt_max")
        is_mamba2 = layers[0].get("x_proj") is None
        kind = "Mamba2Model" if is_mamba2 else "MambaModel"
        arguments = model_arguments(kind, len(layers))
        if pending is None:
            arguments = [argument for argument in arguments if argument.tensor.axes != ("B", "Q")]
        own: dict[str, Any] = {
            "input_ids": input_ids,
            "seq_lens": seq_lens,
            "embedding": embedding,
            "norm_weight": norm_weight,
            "head": head,
            "logits": logits,
        }
        if pending is not None:
            own |= {"pending": pending, "pending_out": pending if pending_out is None else pending_out}
        for i, layer in enumerate(layers):
            own.update((f"layers[{i}].{name}", value) for name, value in layer.items() if value is not None)
        if unknown := own.keys() - {argument.name for argument in arguments}:
            raise PluginError(f"{min(unknown)} is no array of a layer of this kind of model")
        sizes = {"G": n_groups} if is_mamba2 else {}
        arrays, types = checked(arguments, [own.get(a.name) for a in arguments], sizes, dtype, state_dtype)
        skips = {len(arrays[a.name].shape) for a in arguments if a.field == "D" and a.name in arrays}
        if len(skips) > 1:
            raise PluginError("D is [H] in one layer and [H, P] in another: expected one form")
        call = MambaModel(
            layers=len(layers), groups=n_groups, skip_per_channel=skips == {2},
            all_logits=len(arrays["logits"].shape) == 3, eps=eps, norm_eps=norm_eps, dt_min=dt_min, dt_max=dt_max,
        )  # fmt: skip
        for symbol, size in sizes.items():
            if symbol in OPS[kind].sizes:
                setattr(call, OPS[kind].sizes[symbol], size)
        if is_mamba2:
            call.inner = call.heads * call.head_dim
        each = (MambaLayer * len(layers))()
        for argument in arguments:
            if argument.name in arrays:
                at, _, _ = argument.name.removeprefix("layers[").partition("]")
                setattr(each[int(at)] if at.isdigit() else call, argument.field, arrays[argument.name].pointer)
        call.head = call.head or call.embedding
        call.each = ctypes.addressof(each)
        _set_dtypes(call, types["T"], types["S"])
        self._enqueue("model", call, arguments, arrays, workspace, stream)

    def sample_token(
        self,
        logits: Any,
        uniform: Any,
        *,
        steps: Any,
        tokens: Any,
        log: Any,
        seq_lens: Any = None,
        eos_ids: Any = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stream: Any = 0,
    ) -> None:
        """Pick each row's next token as ``runtime.sampling`` does, without a repetition penalty.

        Row b has been sampled ``i = steps[b]`` times, to which 1 is added. The id that ``uniform[i % capacity, b]``
        draws goes to ``tokens[b]`` and to ``log[i % capacity, b]``; a row with a logit that is NaN or infinite has 0 in
        tokens and -1 in log.

        Args:
            logits: float32 [B, V].
            uniform: float64 [capacity, B], in [0, 1); may be None where temperature is 0.
            steps: int32 [B].
            tokens: int32 [B].
            log: int32 [capacity, B], or None. It and uniform may be host memory that the device sees.
            seq_lens: int32 [B], or None. A row with 0 is left alone; one that picks an id of eos_ids is set to 0.
            eos_ids: int32 [any], or None.
            temperature: As in ``Sampling``, like the next three, which are rounded to float32.
            top_k: 0 is off.
            top_p: 1 is off.
            min_p: 0 is off.
            stream: As in every call.
        """
        temperature, top_p, min_p = (c_float(value).value for value in (temperature, top_p, min_p))
        for name, value, allowed, inside in (
            ("temperature", temperature, "a finite number, 0 (greedy) or above", 0 <= temperature < math.inf),
            ("top_k", top_k, f"0 (off) to {INT32_MAX}", 0 <= top_k <= INT32_MAX),
            ("top_p", top_p, "a number above 0 and at most 1 (off)", 0 < top_p <= 1),
            ("min_p", min_p, "a number from 0 (off) to 1", 0 <= min_p <= 1),
        ):
            if not inside:
                raise PluginError(f"{name} is {value}: expected {allowed}")
        if uniform is None and temperature > 0:
            raise PluginError(f"uniform is None: expected an array, as temperature is {temperature}")
        constants = {
            "capacity": 1,
            "endings": 0,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        self._run("sample_token", (logits, uniform, eos_ids, steps, tokens, log, seq_lens), constants, None, stream)

    def workspace_bytes(self, op: str, *, dtype: str = "float32", state_dtype: str = "float32", **sizes: int) -> int:
        """Bytes of scratch memory that a call of these sizes needs.

        Args:
            op: The method's name, ``ssd_scan`` say.
            dtype: Of x, or of the weight.
            state_dtype: Of ssm_state.
            **sizes: Every size in the op's struct by its name there: batch, length, channels and so on; of ``model``
                those of Mamba, or of Mamba-2 without ``inner``.
        """
        return self._workspace_bytes(op, _sized(op, dtype, state_dtype, sizes))

    def pending_row(self, **sizes: int) -> int:
        """Of :meth:`model`: how many float32 values a row of ``pending`` has. Sizes as for :meth:`workspace_bytes`."""
        return self._pending_row(_sized("model", "float32", "float32", sizes))

    def _pending_row(self, call: ctypes.Structure) -> int:
        return int(self._library.mamba_pending_row(ctypes.byref(call)))

    def _workspace_bytes(self, op: str, call: ctypes.Structure) -> int:
        return int(getattr(self._library, f"mamba_{op}_workspace")(ctypes.byref(call)))

    def _run(
        self,
        name: str,
        given: tuple[Any, ...],
        constants: Mapping[str, Any],
        workspace: Any,
        stream: Any,
        dtype: str | None = None,
        state_dtype: str | None = None,
    ) -> None:
        op = SIGNATURES[name]
        values = dict(zip(pointers(op.struct), given, strict=True))
        sizes = {"G": constants["groups"]} if "groups" in constants else {}
        arrays, types = checked(op.arguments, [values[a.field] for a in op.arguments], sizes, dtype, state_dtype)
        call = op.struct(**constants)
        for symbol, size in sizes.items():
            setattr(call, op.sizes[symbol], size)
        for argument in op.arguments:
            if argument.name in arrays:
                setattr(call, argument.field, arrays[argument.name].pointer)
        _set_dtypes(call, types.get("T", "float32"), types.get("S", "float32"))
        self._enqueue(name, call, op.arguments, arrays, workspace, stream)

    def _enqueue(
        self,
        name: str,
        call: ctypes.Structure,
        arguments: Sequence[Argument],
        arrays: Mapping[str, Array],
        workspace: Any,
        stream: Any,
    ) -> None:
        """Check the workspace, and what lies where, and launch."""
        allowed = {argument.name: argument.may_be for argument in arguments if argument.output}
        needed = self._workspace_bytes(name, call)
        used = list(arrays.values())
        if needed:
            scratch = as_workspace(workspace, needed)
            used.append(scratch)
            allowed["workspace"] = ""
        check_devices(used)
        check_overlap(used, allowed)
        self._launch(name, call, scratch.pointer if needed else 0, stream_handle(stream))

    def _launch(self, op: str, call: ctypes.Structure, workspace: int, stream: int) -> None:
        code = getattr(self._library, f"mamba_{op}")(ctypes.byref(call), workspace or None, stream)
        if code:
            raise _cuda_error(op, code)


class RuntimeKernels(Kernels):
    """The kernels without a library: each is compiled by NVRTC when it is first needed, and kept in the user's cache.

    For machines without nvcc. It needs cuda-bindings, NVRTC and CUDA's headers (the extra ``nvrtc``) and a current CUDA
    context. A first call with other sizes or dtypes than before may compile; before capturing a CUDA graph run it once.
    """

    def __init__(self) -> None:
        from mamba_deploy.plugins import launches, nvrtc

        self._launches, self._nvrtc = launches, nvrtc

    def _workspace_bytes(self, op: str, call: ctypes.Structure) -> int:
        return self._launches.workspace_bytes(op, call)

    def _pending_row(self, call: ctypes.Structure) -> int:
        return pending_row(call)

    def _launch(self, op: str, call: ctypes.Structure, workspace: int, stream: int) -> None:
        device = self._nvrtc.current_device()
        self._nvrtc.launch(getattr(self._launches, op)(call, workspace, device), device, stream)


def _sized(op: str, dtype: str, state_dtype: str, sizes: Mapping[str, int]) -> ctypes.Structure:
    """The struct of a call of these sizes, without addresses."""
    if op not in SIGNATURES:
        raise PluginError(f"op is {op!r}: expected one of {', '.join(SIGNATURES)}")
    names = list(SIGNATURES[op].sizes.values())
    if not set(names) - SIGNATURES[op].optional_sizes <= sizes.keys() <= set(names):
        raise PluginError(f"{op} was given the sizes {', '.join(sizes)}: expected {', '.join(names)}")
    check_sizes({symbol: sizes[name] for symbol, name in SIGNATURES[op].sizes.items() if name in sizes})
    call = SIGNATURES[op].struct(**sizes)
    if isinstance(call, MambaModel) and call.heads:
        call.inner = call.heads * call.head_dim
    _set_dtypes(call, check_dtype_name("dtype", dtype), check_dtype_name("state_dtype", state_dtype))
    return call


def _set_dtypes(call: ctypes.Structure, dtype: str, state_dtype: str) -> None:
    for name, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        if hasattr(call, name):
            setattr(call, name, DTYPES[value])


def _cuda_error(op: str, code: int) -> PluginError:
    name = CUDA_ERRORS.get(code, "of no name known here")
    return PluginError(f"{op}: CUDA error {code} ({name})", hint=_ERROR_HINTS.get(code, ""))


def load(path: str | Path | None = None) -> Kernels:
    """Open a library of the kernels: ``path``, or the one built for this machine, built now if need be.

    Raises:
        PluginError: It cannot be built or loaded.
    """
    if path is None:
        from mamba_deploy.plugins import build

        path = build.kernels_library()
    return Kernels(path)
