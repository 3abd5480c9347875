"""The closed forms of many weights of unlike sizes, in as many launches as one takes."""

from .op import direct_many

__all__ = ["direct_many"]
