"""Routes: openai/models."""

from fastapi import APIRouter

router = APIRouter()
