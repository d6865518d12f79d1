"""Is the exported model still the same model?  Compared stage by stage with what PyTorch computed, without PyTorch."""

from edgevlm.verify.gate import Verification, golden_answers_match, verify_all, verify_bundle, verify_chosen

__all__ = ["Verification", "golden_answers_match", "verify_all", "verify_bundle", "verify_chosen"]
