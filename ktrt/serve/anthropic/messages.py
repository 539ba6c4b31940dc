"""Routes: anthropic/messages."""

from fastapi import APIRouter

router = APIRouter()
