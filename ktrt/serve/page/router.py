"""Routes: page/router."""

from fastapi import APIRouter

router = APIRouter()
