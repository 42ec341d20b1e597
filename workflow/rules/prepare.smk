rule prepare:
    """Source -> uint8 arrays, fixed splits, class means, data card."""
    input:
        source=ARCHIVE,
        code=CODE["prepare"],
    output:
        data=DATA,
        card=CARD,
    log:
        f"{LOGS}/prepare.log",
    benchmark:
        f"{BENCHMARKS}/prepare.tsv"
    conda:
        "../envs/ebjdat.yaml"
    params:
        settings=SETTINGS,
        listing=listing(PROFILE.data.path),
        sections=sections("data"),
    shell:
        "python -m ebjdat prepare {params.settings} --out {output.data} --card {output.card} 2>&1 | tee -i {log}"
