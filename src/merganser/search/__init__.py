"""Search the free values of recipes: ask and tell, trials in memory, waves of items, and a held-out test.

found = search("recipe.yaml", "study", ["french.txt"], base="base", experts={"french": "expert"})
"""

from .found import Found
from .run import Interrupted, search
from .trials import Progress, Trial

__all__ = ["Found", "Interrupted", "Progress", "Trial", "search"]
