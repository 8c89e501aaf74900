"""Responses of source models: vLLM in process, or any OpenAI-compatible server."""
