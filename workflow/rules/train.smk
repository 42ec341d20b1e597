rule pretrain:
    """A checkpoint that several experiments start from; 0 epochs: the fresh initialisation."""
    input:
        unpack(inputs("pretrain")),
    output:
        **outputs("pretrain"),
    log:
        log_of("pretrain"),
    benchmark:
        benchmark_of("pretrain")
    priority: 2  # before attacks, so that the longest chain starts early
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("pretrain"),
        depends_on=depends_on("pretrain"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"


rule finetune:
    """An experiment's training, from its pretraining's checkpoint."""
    input:
        unpack(inputs("finetune")),
    output:
        **outputs("finetune"),
    log:
        log_of("finetune"),
    benchmark:
        benchmark_of("finetune")
    priority: 2  # before attacks, so that the longest chain starts early
    conda:
        "../envs/ebjdat.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        command=command("finetune"),
        depends_on=depends_on("finetune"),
    shell:
        "python -m ebjdat {params.command} --threads {threads} 2>&1 | tee -i {log}"
