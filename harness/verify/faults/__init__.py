"""Faults that public code had, planted on purpose, and what catches each."""
