"""Routes: vllm/adapters."""

from fastapi import APIRouter

router = APIRouter()
