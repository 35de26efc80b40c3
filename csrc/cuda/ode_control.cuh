// Who decides on the steps of a solve, as ode_reference.py has it: from sums over the samples to what becomes of a step
// and to the next one. What takes the steps is in ode.cu, all in one kernel, and in ode_stages.cu, a kernel each.
#pragma once

#include "../ode.h"
#include "launch.cuh"

namespace fastflow {

enum Phase : int64_t { kBegin, kSlope, kGuess, kStep, kDone, kNotFinite, kUnderflow, kTooMany };

constexpr int kNorms = 8;  // sums of squares: value, trace and two energies, of one or two quantities

// How far a solve is.
struct Control {
  double t, h;   // where the state is, and the step to try
  double slope;  // norm of the first slope
  int64_t phase, evaluations, accepted, rejected;
  int64_t next;     // of the times to reach
  int64_t spacing;  // steps between the states that are kept
};

// What becomes of the step that was tried.
struct Verdict {
  double t, h;
  int64_t accepted;
  int64_t first, last;    // the times [first, last) are reached
  int64_t slot, thinned;  // of the kept states: where this one goes, or -1; was every other one dropped before?
};

// What the decision depends on.
struct Rules {
  Tableau method;
  const double *times, *grid;  // [1 + count]; where fixed steps begin and end, none: adaptive
  int64_t count, checkpoints, max_steps, controls;
  int features;
  double sign, epsilon;  // of time; of the state's type
};

template <class T>
FF_HD double epsilon() {
  return sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
}

FF_D double over(double error, double scale) { return error == 0 ? 0 : error / scale; }

// The larger, and what is not a number
FF_D double larger(double a, double b) { return a != a || a >= b ? a : b; }

// The largest of the roots of the means over n samples
FF_D double norm(const double* sums, int64_t n, int features) {
  double found = sums[0] / double(n * features);
  for (int k = 1; k < kNorms / 2; ++k) found = larger(found, sums[k] / double(n));
  return ::sqrt(found);
}

// Is the state kept from which step `accepted` goes on?
FF_D void keep_state(const Rules& r, Control& c, Verdict& v) {
  if (r.checkpoints == 0) return;
  if (full(c.accepted, c.spacing, r.checkpoints)) c.spacing *= 2, v.thinned = 1;
  v.slot = slot(c.accepted, c.spacing);
}

// The times up to t
FF_D void reach(const Rules& r, double t, Control& c, Verdict& v) {
  v.first = c.next;
  while (c.next <= r.count && r.sign * r.times[c.next] <= r.sign * t) ++c.next;
  v.last = c.next;
  if (c.next > r.count) c.phase = kDone;
}

// What a turn found, sums over n samples, and what follows of it. Writes the step where there is place for it.
FF_D void decide(const Rules& r, Control& c, Verdict& v, const double* sums, int64_t n, double* steps) {
  const bool adaptive = r.grid == nullptr;
  v.accepted = 0, v.first = v.last = 1, v.slot = -1, v.thinned = 0;
  if (c.phase == kBegin) {
    c.t = r.times[0], c.h = 0, c.next = 1, c.spacing = 1;
    c.evaluations = c.accepted = c.rejected = 0;
    reach(r, c.t, c, v);
    if (c.phase == kDone) return;
    keep_state(r, c, v);
    c.phase = adaptive || r.method.fsal ? kSlope : kStep;
    if (!adaptive) c.h = r.grid[1] - r.grid[0];
  } else if (c.phase == kSlope) {
    c.evaluations += 1;
    c.phase = kStep;
    if (!adaptive) return;
    const double state = norm(sums, n, r.features);
    c.slope = norm(sums + kNorms / 2, n, r.features);
    c.h = state == state ? r.sign * trial_step(state, c.slope) : 0;
    c.phase = state == state ? kGuess : kNotFinite;
  } else if (c.phase == kGuess) {
    c.evaluations += 1;
    const double trial = r.sign * c.h;
    c.h = r.sign * first_step(trial, c.slope, norm(sums, n, r.features) / trial, r.method.order);
    c.phase = c.t + c.h == c.t ? kUnderflow : kStep;
  } else if (c.phase == kStep) {
    c.evaluations += r.method.stages - (r.method.fsal ? 1 : 0);
    const double error = norm(sums, n, r.features);  // of fixed steps: 0, or not a number
    if (error <= 1) {
      if (steps) steps[2 * r.controls * c.accepted] = c.t, steps[2 * r.controls * c.accepted + 1] = c.h;
      v.t = c.t, v.h = c.h, v.accepted = 1;
      ++c.accepted;
      c.t = adaptive ? c.t + c.h : r.grid[c.accepted];
      reach(r, c.t, c, v);
      if (c.phase == kDone) return;
      keep_state(r, c, v);
    } else {
      ++c.rejected;
    }
    if (!adaptive) {
      if (v.accepted)
        c.h = r.grid[c.accepted + 1] - r.grid[c.accepted];
      else
        c.phase = kNotFinite, c.t += c.h, --c.rejected;
      return;
    }
    c.h *= growth(error, r.method.order);
    // near an overflow the steps could shrink without end: below the rounding of the state it is given up
    const double finest = r.epsilon * r.sign * (r.times[r.count] - r.times[0]);
    const bool stuck = c.t + c.h == c.t || (!finite(error) && r.sign * c.h < finest);
    if (stuck || c.accepted + c.rejected >= r.max_steps)
      c.phase = !finite(error) ? kNotFinite : stuck ? kUnderflow : kTooMany;
  }
}

}  // namespace fastflow
