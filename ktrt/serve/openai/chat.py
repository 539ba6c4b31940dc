"""Routes: openai/chat."""

from fastapi import APIRouter

router = APIRouter()
