"""mkdocs: the results lie beside docs/ in the repository and below it on the site, so their links differ.

Of results that have not been measured yet the name alone is shown.
"""

import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links that hold on the site."""
    if not page.file.src_uri.startswith("results/"):
        return markdown.replace("](../results/", "](results/")

    def held(link: re.Match[str]) -> str:
        return link[0] if (RESULTS / link[2]).is_file() else link[1]

    return re.sub(r"\[([^\]]*)\]\(([\w-]+\.md)\)", held, markdown.replace("](../docs/", "](../"))
