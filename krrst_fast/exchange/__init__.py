"""Distilled sets in the layouts of other projects: `export_set` writes one, `import_set` reads."""

from krrst_fast.exchange.layouts import IMPORTS
from krrst_fast.exchange.read import Imported, import_set
from krrst_fast.exchange.write import EXPORTS, export_set

__all__ = ["EXPORTS", "IMPORTS", "Imported", "export_set", "import_set"]
