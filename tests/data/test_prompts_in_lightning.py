from collections.abc import Callable

import jsonargparse
import pytest
from lightning.pytorch import LightningModule, Trainer

from lit_posttrain.data import Example, Template, VerifiablePrompts
from lit_posttrain.data.base import PostTrainDataModule
from lit_posttrain.types import PromptBatch

Jsonl = Callable[..., str]
Make = Callable[..., VerifiablePrompts]
ROWS = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(60)]


class Reader(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[PromptBatch] = []
        self.configured = False

    def configure_model(self) -> None:
        self.configured = True

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch)


def run(model: Reader, data: VerifiablePrompts) -> None:
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).validate(
        model, datamodule=data, verbose=False
    )


def test_lightning_hands_prompts_over_untouched(make_data: Make, jsonl: Jsonl) -> None:
    model, data = Reader(), make_data(dataset=jsonl(ROWS))
    run(model, data)
    assert [p for batch in model.seen for p in batch.prompts] == data.prompts("val")
    assert model.seen[0].prompts[0].token_ids is data.prompts("val")[0].token_ids


def test_bad_data_stops_before_the_model_is_built(make_data: Make, jsonl: Jsonl) -> None:
    model = Reader()
    with pytest.raises(ValueError, match=r"column 'prompt' is empty"):
        run(model, make_data(dataset=jsonl([{"prompt": "", "answer": "1"}])))
    assert not model.configured


def test_it_is_written_in_yaml(jsonl: Jsonl, tokenizer_folder: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PostTrainDataModule, "data")
    yaml = f"""{{class_path: lit_posttrain.data.VerifiablePrompts, init_args: {{
        dataset: {jsonl(ROWS[:12])}, batch_size: 3, tokenizer: {tokenizer_folder}, held_out_percent: 0,
        column_map: {{prompt: prompt}}, template: {{kind: few_shot, examples: [{{question: a, completion: b}}]}}}}}}"""
    data = parser.instantiate(parser.parse_args([f"--data={yaml}"])).data
    assert data.template == Template(kind="few_shot", examples=(Example("a", "b"),))
    data.setup("fit")
    assert len(data.train_dataloader()) == 4
