rule pretrain:
    """A checkpoint that several experiments start from; 0 epochs: the fresh initialisation."""
    input:
        data=DATA,
        code=CODE["train"],
    output:
        checkpoint=f"{CHECKPOINTS}/pretraining/{{pretraining}}/seed{{seed}}.safetensors",
        metrics=f"{RESULTS}/pretraining/{{pretraining}}/seed{{seed}}/pretrain.json",
        journal=f"{RESULTS}/pretraining/{{pretraining}}/seed{{seed}}/pretrain.journal.jsonl",
        curve=f"{RESULTS}/pretraining/{{pretraining}}/seed{{seed}}/pretrain_curve.csv",
    log:
        f"{LOGS}/pretraining/{{pretraining}}/seed{{seed}}.log",
    benchmark:
        f"{BENCHMARKS}/pretraining/{{pretraining}}/seed{{seed}}.tsv"
    priority: 2  # before attacks, so that the longest chain starts early
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections(
            "model", "training", "bases.{base}", "pretraining.{pretraining}"
        ),
    shell:
        "python -m ebjdat pretrain {params.settings} --pretraining {wildcards.pretraining} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --out {output.checkpoint} --metrics {output.metrics} --curve {output.curve}"
        " 2>&1 | tee -i {log}"


rule finetune:
    """An experiment's training, from its pretraining's checkpoint."""
    input:
        data=DATA,
        initial=initial_checkpoint,
        code=CODE["train"],
    output:
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/finetune.json",
        journal=f"{RESULTS}/{{experiment}}/seed{{seed}}/finetune.journal.jsonl",
        curve=f"{RESULTS}/{{experiment}}/seed{{seed}}/finetune_curve.csv",
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/finetune.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/finetune.tsv"
    priority: 2  # before attacks, so that the longest chain starts early
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections(
            "model", "training", "bases.{base}", "experiments.{experiment}"
        ),
    shell:
        "python -m ebjdat finetune {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --initial {input.initial}"
        " --out {output.checkpoint} --metrics {output.metrics} --curve {output.curve}"
        " 2>&1 | tee -i {log}"
