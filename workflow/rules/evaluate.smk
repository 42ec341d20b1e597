rule attack:
    """Clean accuracy, PGD and the ensembles of every protocol, with integrity checks."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        source=TRANSFER,
        code=CODE["attack"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/attack.json",
        journal=f"{RESULTS}/{{experiment}}/seed{{seed}}/attack.journal.jsonl",
        verdicts=f"{RESULTS}/{{experiment}}/seed{{seed}}/verdicts.parquet",
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/attack.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/attack.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        source=f"--source {TRANSFER[0]}" if TRANSFER else "",
        sections=sections("evaluation.attack"),
    shell:
        "python -m ebjdat attack {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} {params.source} --out {output.metrics} --verdicts {output.verdicts}"
        " 2>&1 | tee -i {log}"


rule generate:
    """Fresh chains and the replay buffer: pictures, and how they compare with real images."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        reference=f"{CHECKPOINTS}/{REFERENCE.experiment}/seed{REFERENCE.seed}.safetensors",
        inception=[p for p in [INCEPTION] if p and Path(p).is_file()],
        code=CODE["draw"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/generate.json",
        journal=f"{RESULTS}/{{experiment}}/seed{{seed}}/generate.journal.jsonl",
        samples=f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.npz",
        grid=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.png",
            caption="../report/samples.rst",
            category="Samples",
            labels={
                "experiment": "{experiment}",
                "seed": "{seed}",
                "what": "samples",
            },
        ),
        chains=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/chains.gif",
            caption="../report/chains.rst",
            category="Samples",
            labels={
                "experiment": "{experiment}",
                "seed": "{seed}",
                "what": "chains",
            },
        ),
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/generate.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/generate.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections("evaluation.generate"),
    shell:
        "python -m ebjdat generate {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} --reference {input.reference}"
        " --out {output.metrics} --samples {output.samples} --grid {output.grid} --chains {output.chains}"
        " 2>&1 | tee -i {log}"


rule energy:
    """Energies of clean, adversarial and generated images, and their gaps."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        samples=f"{RESULTS}/{{experiment}}/seed{{seed}}/samples.npz",
        code=CODE["draw"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.json",
        journal=f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.journal.jsonl",
        values=f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.npz",
        figure=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/energy.png",
            caption="../report/energy.rst",
            category="Energies",
            labels={"experiment": "{experiment}", "seed": "{seed}"},
        ),
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/energy.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/energy.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        sections=sections("evaluation.energy", "evaluation.attack"),
    shell:
        "python -m ebjdat energy {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint} --samples {input.samples}"
        " --out {output.metrics} --values {output.values} --figure {output.figure}"
        " 2>&1 | tee -i {log}"


rule reliability:
    """Calibration, and how well out-of-distribution and adversarial images are told from test images."""
    input:
        data=DATA,
        checkpoint=f"{CHECKPOINTS}/{{experiment}}/seed{{seed}}.safetensors",
        ood=[p for p in [OOD_PATH] if p and Path(p).is_file()],
        code=CODE["reliability"],
    output:
        metrics=f"{RESULTS}/{{experiment}}/seed{{seed}}/reliability.json",
        journal=f"{RESULTS}/{{experiment}}/seed{{seed}}/reliability.journal.jsonl",
        values=f"{RESULTS}/{{experiment}}/seed{{seed}}/reliability.npz",
        figure=report(
            f"{RESULTS}/{{experiment}}/seed{{seed}}/reliability.png",
            caption="../report/reliability.rst",
            category="Reliability",
            labels={"experiment": "{experiment}", "seed": "{seed}"},
        ),
    log:
        f"{LOGS}/{{experiment}}/seed{{seed}}/reliability.log",
    benchmark:
        f"{BENCHMARKS}/{{experiment}}/seed{{seed}}/reliability.tsv"
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        settings=SETTINGS,
        listing=listing(OOD_PATH),
        sections=sections("data.root", "evaluation.reliability", "evaluation.attack"),
    shell:
        "python -m ebjdat reliability {params.settings} --experiment {wildcards.experiment} --seed {wildcards.seed} --threads {threads}"
        " --data {input.data} --weights {input.checkpoint}"
        " --out {output.metrics} --values {output.values} --figure {output.figure}"
        " 2>&1 | tee -i {log}"
