"""Attention: prefill forward."""
