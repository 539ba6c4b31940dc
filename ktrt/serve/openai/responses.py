"""Routes: openai/responses."""

from fastapi import APIRouter

router = APIRouter()
