"""Options of the report stage: what is written about the completions."""

from dataclasses import dataclass

from gmpo.option import option


@dataclass
class ReportSettings:
    log_completions: bool = option(
        False,
        "Show sampled completions on the console and write all of them to "
        "output_dir/completions/*.parquet.",
    )
    num_completions_to_print: int | None = option(
        None, "Completions in the console table, drawn at random; None prints all, 0 none.", low=0
    )
    log_unique_prompts: bool = option(
        False, "Show one completion per prompt in the tables of the trackers."
    )
    log_completions_hub_repo: str | None = option(
        None, "A dataset repository on the hub that gets the parquet files."
    )
    log_multimodal: bool = option(
        True, "Put the images of multimodal prompts into the tables of the trackers.", later=True
    )
