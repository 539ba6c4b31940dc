"""Routes: openai/completions."""

from fastapi import APIRouter

router = APIRouter()
