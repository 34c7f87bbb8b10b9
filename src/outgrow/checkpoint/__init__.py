"""Safetensors and Hugging Face directories: read by byte range, written headers first, finished or absent."""
