"""Saving executables: a directory of JSON, safetensors and ONNX that holds no code. See `store` for its safety."""
