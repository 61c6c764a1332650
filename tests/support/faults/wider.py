"""Planted faults that nobody was seen to make, each with the check that must catch it."""

from __future__ import annotations

import math
from collections.abc import Callable

from harness.dp import Fixed, Flat, GroupWise, Method, Refined, Views
from harness.verify import conformance as checks
from harness.verify.faults import parts
from tests.support.faults import engines, noises, others, rules, samplers

VIEWS = Views(views=3, pad=1)

WIDER: tuple[tuple[Method, Callable[[checks.Subject], None]], ...] = (
    # Clipping rules
    (Method(clip=parts.TooLow(0.3)), checks.clip_rule),
    (Method(clip=parts.NotDoubled()), checks.clip_rule),
    (Method(clip=rules.Growing()), checks.within_sensitivity_later),
    (Method(clip=rules.Growing()), checks.clip_rule),
    (Method(clip=rules.LateGrowing()), checks.within_sensitivity_much_later),
    (Method(clip=rules.LateGrowing()), checks.clip_rule),
    (Method(clip=rules.Gap()), checks.clip_rule),
    (Method(clip=rules.Gap(low=1e20, high=math.inf)), checks.clip_rule),
    (Method(clip=rules.KeepsInfinite()), checks.clip_rule),
    (Method(clip=rules.RoundedUp(1e-6)), checks.clip_rule),
    (Method(clip=rules.GroupByGroup()), checks.clip_rule),
    (Method(clip=rules.Relative()), checks.clip_rule),
    (Method(clip=rules.EveryTenthMedian()), checks.twins_later),
    (Method(clip=rules.PrivateScale()), checks.within_sensitivity),
    (Method(clip=rules.SmallScale(allocation="equal")), checks.clip_rule),
    (Method(clip=rules.SmallScale(0.01, allocation="equal")), checks.within_sensitivity_later),
    (Method(clip=rules.TwoScales(by="flat")), checks.clip_rule),
    (Method(clip=rules.OnlyIfAny()), checks.empty_step),
    (Method(clip=rules.SometimesCounts()), checks.within_sensitivity_much_later),
    (Method(clip=rules.NeverCounts()), checks.billed),
    (Method(clip=rules.WholeNumbers()), checks.calibrated),
    (Method(clip=rules.MeanNorm()), checks.within_sensitivity),
    (Method(clip=rules.SumsOfNorms()), checks.within_sensitivity),
    (Method(clip=rules.SumsOfNorms()), checks.clip_rule),
    (Method(clip=rules.WholeCounts()), checks.clip_rule),
    (Method(clip=rules.OneCount()), checks.clip_rule),
    (Method(clip=rules.AddedCounts()), checks.clip_rule),
    (Method(clip=rules.AddedCounts(), sampler=Fixed()), checks.replaced),
    # Engines
    (Method(engine=engines.Coarse(), clip=Flat(0.1)), checks.within_sensitivity_float32),
    (Method(engine=engines.Coarse(sequences=True)), checks.within_sensitivity_sequence),
    (Method(loss=VIEWS, engine=engines.ViewsAveragedLate(), clip=Flat(0.1)), checks.equals_loop),
    (Method(clip=Refined(0.1, share=0.1), engine=engines.Uncut()), checks.equals_loop),
    (Method(engine=engines.ChangesLate(clips=2.0)), checks.within_sensitivity_much_later),
    (Method(engine=engines.ChangesLate(noises=0.5)), checks.within_sensitivity_much_later),
    (Method(engine=engines.LastPiece()), checks.other_sizes),
    *((Method(engine=engines.NormsBy(fault=fault), clip=Flat(0.1)), checks.other_models) for fault in engines.WRONG_IN),
    (Method(engine=engines.ByThreads()), checks.thread_free),
    (Method(engine=engines.Unmarked()), checks.identified),
    (Method(engine=engines.PrivateMomentum()), checks.forgetful),
    (Method(engine=engines.Borrows(), optimizer=others.UsesSum()), checks.poisoned),
    # Losses, optimizers and paths
    (Method(loss=others.Balanced()), checks.forgetful),
    (Method(loss=others.Mixup()), checks.separately),
    (Method(loss=others.Doubled()), checks.separately),
    (Method(engine=engines.Watching(), optimizer=others.UsesSum()), checks.twins),
    (Method(engine=engines.Watching(), optimizer=others.RemembersSum()), checks.twins),
    (Method(engine=engines.Watching(), optimizer=others.Plateau()), checks.twins_later),
    (Method(engine=engines.Watching(), optimizer=others.LateMomentum()), checks.twins_later),
    (Method(engine=engines.Watching(), path=others.BestByLoss()), checks.twins),
    (Method(optimizer=others.Warming()), checks.resumed),
    (Method(path=others.Drift()), checks.still),
    (Method(path=others.Discount()), checks.amended),
    (Method(path=others.DiscountsLarge()), checks.amended),
    # Noise
    (Method(clip=Flat(0.1), noise=noises.Quiet()), checks.noised),
    (Method(clip=Flat(2.0), noise=noises.Quiet()), checks.noise_billed),
    (Method(clip=GroupWise(allocation="dimension"), noise=noises.Scaleless()), checks.noised),
    (Method(clip=GroupWise(allocation="optimal"), noise=noises.OneScaleShort()), checks.noised),
    (Method(noise=noises.Bare()), checks.noised),
    (Method(noise=noises.Uneven()), checks.noised),
    (Method(noise=noises.Uniform()), checks.noised),
    (Method(noise=noises.Clamped()), checks.noised),
    (Method(noise=noises.InHalf()), checks.noised),
    (Method(noise=noises.FirstThousands()), checks.noised),
    (Method(noise=noises.Mirrored()), checks.noised),
    (Method(noise=noises.Paired()), checks.independent),
    (Method(noise=noises.Cancelling()), checks.independent),
    (Method(noise=noises.Shared()), checks.independent),
    (Method(noise=parts.SharedRows(share=0.05)), checks.independent),
    (Method(noise=noises.Restarting(), clip=rules.Counted()), checks.independent),
    (Method(noise=noises.Overstated()), checks.noise_billed),
    (Method(noise=noises.OneOfSeveral()), checks.noise_billed),
    (Method(noise=noises.AsLaplace()), checks.noise_billed),
    # Samplers
    (Method(sampler=samplers.FixedAsPoisson()), checks.sampled),
    (Method(sampler=samplers.OneBatch()), checks.sampled),
    (Method(sampler=samplers.OneSeed()), checks.sampled),
    (Method(sampler=samplers.Together()), checks.sampled),
    (Method(sampler=samplers.SometimesFree()), checks.sampled),
    (Method(sampler=samplers.Amplifies()), checks.sampled),
    (Method(sampler=samplers.WithReplacement()), checks.sampled),
    (Method(sampler=samplers.NeverShuffles()), checks.sampled),
    (Method(sampler=samplers.HalfEpochs()), checks.sampled),
    (Method(sampler=samplers.ShufflesMany()), checks.sampled_at_large),
    (Method(sampler=samplers.Recycled()), checks.sampled_at_large),
    (Method(sampler=samplers.CutShort()), checks.sampled_at_large),
    (Method(sampler=samplers.FreeLater()), checks.sampled_at_large),
    (Method(sampler=samplers.DrawsMoreLater()), checks.sampled_at_large),
    (Method(sampler=samplers.CoarseCoins()), checks.sampled_at_large),
    (Method(sampler=samplers.ShufflesApart()), checks.sampled_at_large),
)
