"""How the page names the images that it shows: by their own id, their building's and their dataset's."""

from dataclasses import dataclass

from pipeline.retrieval.features import Features


@dataclass(frozen=True)
class RowNames:
    """The names of the rows of a split."""

    features: Features

    def image(self, row: int) -> str:
        """Return an image's id."""
        return str(self.features.image_ids[row].as_py())

    def building(self, row: int) -> str:
        """Return the id of an image's building."""
        return str(self.features.building_ids[int(self.features.building_codes[row])].as_py())

    def describe(self, *rows: int) -> str:
        """Name images and their buildings."""
        return ", ".join(f"{self.image(row)} of building {self.building(row)}" for row in rows)

    def list_datasets(self, *rows: int) -> str:
        """Return the datasets of images, each once."""
        return " ".join(sorted({f"{int(self.features.dataset_ids[row]):04d}" for row in rows}))
