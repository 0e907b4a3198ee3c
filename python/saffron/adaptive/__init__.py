"""Width of a Saffron search chosen request by request, with a floor under the share of safe answers.

`AdaptiveWidth` knows neither models nor torch: it is told risks, scores and verdicts, and says widths.
`saffron.search.adaptive` runs it on an engine. docs/adaptive-width.md says what is guaranteed.
"""

from saffron.adaptive.control import WidthControl
from saffron.adaptive.log import LoggedSearch, Qualified, qualify
from saffron.adaptive.settings import WidthSettings
from saffron.adaptive.width import AdaptiveWidth, merge

__all__ = ["AdaptiveWidth", "LoggedSearch", "Qualified", "WidthControl", "WidthSettings", "merge", "qualify"]
