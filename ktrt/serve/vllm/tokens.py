"""Routes: vllm/tokens."""

from fastapi import APIRouter

router = APIRouter()
