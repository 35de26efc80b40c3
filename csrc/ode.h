// Explicit Runge-Kutta methods and their step control, host and device, as fastflow/ops/ode_method.py and
// ode_reference.py have them. Times, steps and norms are double whatever the state is; steps are signed.
#pragma once

#include "math.h"

namespace fastflow {

// A method as Method.pack() lists it: stages, order, fsal, adaptive, c [s], a [s, s], b [s], error [s], dense [s, 4].
struct Tableau {
  static constexpr int max_stages = 8, degree = 4, header = 4;  // degree of the polynomials b_i(theta)

  int stages = 0, order = 0;
  bool fsal = false, adaptive = false;
  const double *c = nullptr, *a = nullptr, *b = nullptr, *error = nullptr, *polynomials = nullptr;

  Tableau() = default;
  FF_HD explicit Tableau(const double* flat)
      : stages(int(flat[0])), order(int(flat[1])), fsal(flat[2] != 0), adaptive(flat[3] != 0) {
    c = flat + header, a = c + stages, b = a + stages * stages, error = b + stages, polynomials = error + stages;
  }
  static FF_HD int length(int stages) { return header + stages * (stages + 3 + degree); }

  FF_HD double weight(int i, int j) const { return a[i * stages + j]; }

  // b_i(theta): y(t + theta h) = y + h sum_i b_i(theta) k_i
  FF_HD double dense(int i, double theta) const {
    const double* p = polynomials + i * degree;
    return theta >= 1 ? b[i] : theta * (p[0] + theta * (p[1] + theta * (p[2] + theta * p[3])));
  }
};

FF_HD double least(double a, double b) { return a < b ? a : b; }
FF_HD double most(double a, double b) { return a > b ? a : b; }
FF_HD bool finite(double x) { return x - x == 0; }

// x^(1 / order), x >= 0
FF_HD double root(double x, int order) { return x == 0 ? 0 : exp(log(x) / order); }

// --- the first step: one that Euler's method makes without harm (Hairer, Norsett, Wanner, II.4) -------------------

// from |y| and |f|: how far to try
FF_HD double trial_step(double state, double slope) {
  const double h = state < 1e-5 || slope < 1e-5 ? 1e-6 : 0.01 * state / slope;
  return finite(h) && h > 0 ? h : 1e-6;
}

// and from |f(t + h, y + h f) - f| / h
FF_HD double first_step(double trial, double slope, double bend, int order) {
  double h = slope <= 1e-15 && bend <= 1e-15 ? most(1e-3 * trial, 1e-6) : root(0.01 / most(slope, bend), order);
  if (!(finite(h) && h > 0)) h = trial;
  return least(100 * trial, h);
}

// by how much the step may grow after one whose error had this norm; not finite: as bad as can be
FF_HD double growth(double norm, int order) {
  if (!finite(norm)) return 0.2;
  const double wanted = norm == 0 ? 10 : 0.9 / root(norm, order);
  return least(10, most(wanted, norm < 1 ? 1 : 0.2));
}

// --- the states that are kept: those before the steps 0, spacing, 2 spacing, ..., at most `room` of them -----------

// Before step n: where its state goes, or -1. When all room is taken every other state is
// dropped and the spacing doubles.
FF_HD bool full(int64_t n, int64_t spacing, int64_t room) { return n / spacing >= room; }
FF_HD int64_t slot(int64_t n, int64_t spacing) { return n % spacing == 0 ? n / spacing : -1; }

}  // namespace fastflow
