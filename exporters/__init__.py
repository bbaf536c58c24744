"""From a checkpoint to ONNX, to the reference answers, and to an engine."""
