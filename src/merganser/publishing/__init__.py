"""Publishing an output on the Hugging Face Hub: what is uploaded, the licences of its inputs, and its card."""

from .push import Push, PushedFile, plan_push, push

__all__ = ["Push", "PushedFile", "plan_push", "push"]
