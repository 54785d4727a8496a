// How 256 threads walk over a group of channels in [batch, pixels, channels]: side by side through
// `channels` units of one pixel after the other, without a division a step.

const THREADS: u32 = 256u;

struct Walk { pixel: u32, channel: u32 } // in units of Lanes

fn walk_start(thread: u32, channels: u32) -> Walk {
    return Walk(thread / channels, thread % channels);
}

fn walk_on(at: Walk, step: Walk, channels: u32) -> Walk {
    var next = Walk(at.pixel + step.pixel, at.channel + step.channel);
    if next.channel >= channels { next = Walk(next.pixel + 1u, next.channel - channels); }
    return next;
}
