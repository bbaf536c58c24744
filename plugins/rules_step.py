"""What the parts of a decode step take and give, as :mod:`rules` says it of operators; no graph has them."""

from __future__ import annotations

from collections.abc import Mapping

from mamba_deploy.plugins.rules import Op, parse_tensors

__all__ = ["PARTS"]

PARTS: Mapping[str, Op] = {
    "MambaInProj": Op(
        "in_proj",
        parse_tensors(
            "hidden:float32:B,L,d norm_weight:float32:d weight:T:d,M bias?:T:M conv_weight:T:C,K conv_bias?:T:C "
            "conv_state:T:B,C,K-1 seq_lens:int32:B"
        ),
        parse_tensors("y:T:B,L,M conv_state_out:T:B,C,K-1"),
        {},
        {"B": "batch", "L": "length", "d": "width", "M": "outputs", "C": "channels", "K": "conv_width"},
    ),
    "MambaXProj": Op(
        "x_proj",
        parse_tensors("x:T:B,L,X weight:T:D,E"),
        parse_tensors("y:T:B,L,E"),
        {},
        {"B": "batch", "L": "length", "X": "row", "D": "channels", "E": "outputs"},
    ),
    "MambaSelectiveUpdate": Op(
        "selective_update",
        parse_tensors(
            "xz:T:B,L,X low:T:B,L,E dt_weight:T:R,D A:float32:D,N D?:float32:D dt_bias?:float32:D ssm_state:S:B,D,N "
            "seq_lens:int32:B"
        ),
        parse_tensors("y:T:B,L,D ssm_state_out:S:B,D,N"),
        {},
        {
            "B": "batch",
            "L": "length",
            "X": "row",
            "E": "low_row",
            "R": "rank",
            "D": "channels",
            "N": "state_size",
        },
    ),
    "MambaSsdUpdate": Op(
        "ssd_update",
        parse_tensors(
            "projected:T:B,L,M A:float32:H D?:float32:H|H,P dt_bias?:float32:H ssm_state:S:B,H,P,N seq_lens:int32:B"
        ),
        parse_tensors("y:T:B,L,H*P ssm_state_out:S:B,H,P,N"),
        {},
        {
            "B": "batch",
            "L": "length",
            "M": "row",
            "H": "heads",
            "P": "head_dim",
            "N": "state_size",
            "G": "groups",
        },
    ),
    "MambaOutProj": Op(
        "out_proj",
        parse_tensors("x:T:B,L,D norm_weight?:float32:D weight:T:D,d bias?:T:d residual:float32:B,L,d"),
        parse_tensors("y:float32:B,L,d"),
        {},
        {
            "B": "batch",
            "L": "length",
            "D": "channels",
            "d": "width",
            "G": "groups",
        },
    ),
    "MambaHead": Op(
        "head",
        parse_tensors("hidden:float32:B,L,d norm_weight:float32:d weight:T:V,d"),
        parse_tensors("y:float32:B,V"),
        {},
        {"B": "batch", "L": "length", "d": "width", "V": "vocab"},
    ),
}
