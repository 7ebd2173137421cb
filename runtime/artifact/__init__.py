"""Saving executables: a directory of JSON, safetensors and ONNX, and code only where asked. See `store` for safety."""
