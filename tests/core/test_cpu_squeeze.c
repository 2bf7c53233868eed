/* Squeezing and composing on the cpu: against their formulae, summed up one product at a time in double precision. */
#include "kernel_test.h"

#include <omp.h>

enum { MOST_TERMS = 8 };

/* The numbers of the formula, and for each the root of its summands' squares: what a sum of that kind amounts to where
 * it doesn't happen to cancel. */
typedef struct {
  double *value, *squares;
  int64_t count;
} sums;

static sums sums_new(int64_t count) {
  sums s = {calloc((size_t)count + 1, sizeof(double)), calloc((size_t)count + 1, sizeof(double)), count};
  assert_true(s.value && s.squares);
  return s;
}

static void sums_add(sums *s, int64_t k, double x) {
  s->value[k] += x;
  s->squares[k] += x * x;
}

/* The largest error relative to the largest magnitude. Frees the sums. `positions`: element k of the sums is the
 * array's k-th number in memory, else in logical order. */
static double sums_error(sums *s, const device_array *a, bool positions) {
  double error = 0, magnitude = 0;
  for (int64_t k = 0; k < s->count; k++) {
    double got = test_get(a, k), want = s->value[positions ? test_offset(a, k) : k];
    magnitude = fmax(magnitude, fmax(fabs(s->value[k]), sqrt(s->squares[k])));
    error = got == want ? error : isfinite(got) ? fmax(error, fabs(got - want)) : INFINITY;
  }
  free(s->value);
  free(s->squares);
  return magnitude > 0 ? error / magnitude : error;
}

static void fill_with_nan(const test_array *t) {
  for (int64_t k = 0; k < test_count(&t->a); k++)
    test_set(&t->a, k, NAN);
}

static test_array new_kernel(orepa_dtype dtype, int64_t o, int64_t i, int64_t h, int64_t w, uint64_t seed) {
  test_array t = test_new(dtype, LAYOUT_DENSE, 4, (int64_t[]){o, i, h, w});
  test_fill_normal(&t, seed, 0, 1);
  return t;
}

/* ---- a squeezed kernel and its terms ---- */

typedef struct {
  test_array a, b, scale, da, db, dscale;
} term_arrays;

typedef struct {
  int64_t groups, outputs, channels, height, width; /* O, I/G */
  bool some_taps;                                   /* only these are used */
  orepa_taps taps;
  int count;
  device_term terms[MOST_TERMS];
  term_arrays arrays[MOST_TERMS];
  test_array w, dw;
} problem;

typedef struct {
  device_term_kind kind;
  int64_t height, width, inner; /* of its kernel; T or E */
  bool mark;                    /* plus_identity or interleave */
  int scale;                    /* 0: none, 1: one number, 2: a row of `vector` */
  bool da, db, dscale;
} recipe;

static problem new_problem(int64_t groups, int64_t outputs, int64_t channels, int64_t height, int64_t width) {
  problem p = {.groups = groups, .outputs = outputs, .channels = channels, .height = height, .width = width};
  p.w = new_kernel(OREPA_FLOAT32, outputs, channels, height, width, 1);
  p.dw = new_kernel(OREPA_FLOAT32, outputs, channels, height, width, 2);
  return p;
}

/* A row of a (3, O) `vector` whose elements are two numbers apart; or one number. */
static test_array new_scale(const problem *p, bool one) {
  int64_t count = one ? 1 : p->outputs;
  return test_new_strided(OREPA_FLOAT32, 1, &count, (int64_t[]){one ? 1 : 2});
}

static void add_term(problem *p, recipe r) {
  term_arrays *t = &p->arrays[p->count];
  device_term *term = &p->terms[p->count++];
  int64_t O = p->outputs, I = p->channels, inputs = p->groups * I;
  uint64_t seed = 100 * (uint64_t)p->count;
  *term = (device_term){.kind = r.kind, .plus_identity = r.mark, .interleave = r.mark};
  *t = (term_arrays){0};
  switch (r.kind) {
  case TERM_KERNEL:
    t->a = new_kernel(OREPA_FLOAT32, O, I, r.height, r.width, seed);
    break;
  case TERM_PATTERN: /* as often as not repeated over the outputs, like an average */
    t->a = new_kernel(OREPA_FLOAT32, O, I, 1, 1, seed);
    t->b = test_new_strided(OREPA_FLOAT32, 3, (int64_t[]){O, p->height, p->width},
                            (int64_t[]){r.mark ? 0 : p->height * p->width, p->width, 1});
    test_fill_normal(&t->b, seed + 1, 0, 1);
    break;
  case TERM_PRODUCT:
    t->a = new_kernel(OREPA_FLOAT32, O, r.inner, r.height, r.width, seed);
    t->b = new_kernel(OREPA_FLOAT32, p->groups * r.inner, I, 1, 1, seed + 1);
    break;
  case TERM_DEPTHWISE:
    t->a = new_kernel(OREPA_FLOAT32, O, r.inner * I, 1, 1, seed);
    t->b = new_kernel(OREPA_FLOAT32, r.inner * inputs, 1, r.height, r.width, seed + 1);
    break;
  }
  term->a = t->a.a;
  term->b = t->b.a;
  if (r.scale) {
    t->scale = new_scale(p, r.scale == 1);
    test_fill_normal(&t->scale, seed + 2, 0.5, 1);
    term->scale = t->scale.a;
  }
  if (r.da) {
    t->da = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, t->a.a.shape);
    term->da = t->da.a;
  }
  if (r.db && r.kind >= TERM_PRODUCT) {
    t->db = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, t->b.a.shape);
    term->db = t->db.a;
  }
  if (r.dscale && r.scale) {
    t->dscale = new_scale(p, r.scale == 1);
    term->dscale = t->dscale.a;
  }
}

static void free_problem(problem *p) {
  for (int k = 0; k < p->count; k++) {
    term_arrays *t = &p->arrays[k];
    test_array *all[] = {&t->a, &t->b, &t->scale, &t->da, &t->db, &t->dscale};
    for (int n = 0; n < 6; n++)
      test_release(all[n]);
  }
  test_release(&p->w);
  test_release(&p->dw);
}

static int64_t kernel_position(const device_array *a, int64_t o, int64_t i, int64_t h, int64_t w) {
  return ((o * a->shape[2] + h) * a->shape[3] + w) * a->shape[1] + i;
}

/* The n-th of the products that a term adds to w[o,i,h,w]: positions in a and b, and what is added to b's number.
 * Position -1: no such factor. False where there are no more. */
static bool factors(const problem *p, const device_term *t, int64_t o, int64_t i, int64_t h, int64_t w, int64_t n,
                    int64_t *a, int64_t *b, double *plus) {
  const device_array *spatial = t->kind == TERM_DEPTHWISE ? &t->b : &t->a;
  int64_t I = p->channels, Og = p->outputs / p->groups, g = o / Og;
  *b = -1;
  *plus = 0;
  if (t->kind == TERM_PATTERN) {
    *a = o * I + i;
    *b = o * t->b.strides[0] + h * p->width + w;
    return n == 0;
  }
  h -= (p->height - spatial->shape[2]) / 2;
  w -= (p->width - spatial->shape[3]) / 2;
  if (h < 0 || w < 0 || h >= spatial->shape[2] || w >= spatial->shape[3])
    return false;
  if (t->kind == TERM_KERNEL) {
    *a = kernel_position(&t->a, o, i, h, w);
    *plus = 1;
    return n == 0;
  }
  if (t->kind == TERM_PRODUCT) {
    int64_t T = t->a.shape[1];
    *a = kernel_position(&t->a, o, n, h, w);
    *b = (g * T + n) * I + i;
    *plus = t->plus_identity && i == n % I;
    return n < T;
  }
  int64_t E = t->a.shape[1] / I, row = t->interleave ? o % Og * p->groups + g : o;
  *a = row * E * I + E * i + n;
  *b = kernel_position(&t->b, E * (g * I + i) + n, 0, h, w);
  return n < E;
}

static double number_at(const device_array *a, int64_t position) {
  return ((const float *)a->data)[position];
}

static bool is_used(const problem *p, int64_t h, int64_t w) {
  const orepa_taps *taps = &p->taps;
  return !p->some_taps || (h >= taps->first[0] && h < taps->last[0] && w >= taps->first[1] && w < taps->last[1]);
}

/* w, if asked for, and the gradients of term t. */
static void sum_term(const problem *p, const device_term *t, sums *w, sums *da, sums *db, sums *dscale) {
  int64_t a, b, scales = t->scale.data ? t->scale.shape[0] : 0;
  double plus;
  for (int64_t o = 0; o < p->outputs; o++) {
    double v = scales ? test_get(&t->scale, scales == 1 ? 0 : o) : 1;
    for (int64_t h = 0; h < p->height; h++)
      for (int64_t x = 0; x < p->width; x++)
        for (int64_t i = 0; i < p->channels; i++)
          for (int64_t n = 0; factors(p, t, o, i, h, x, n, &a, &b, &plus); n++) {
            int64_t at = kernel_position(&p->w.a, o, i, h, x);
            double left = number_at(&t->a, a), right = plus + (b < 0 ? 0 : number_at(&t->b, b));
            double d = number_at(&p->dw.a, at);
            sums_add(w, at, is_used(p, h, x) ? v * left * right : 0);
            sums_add(da, a, d * v * right);
            if (b >= 0 && db->count)
              sums_add(db, b, d * v * left);
            if (scales)
              sums_add(dscale, scales == 1 ? 0 : o, d * left * right);
          }
  }
}

static void squeeze_both_ways(const orepa_device *device, problem *p) {
  device_context context = test_context(device);
  test_array *all[3 * MOST_TERMS + 1] = {&p->w};
  int count = 1;
  const orepa_taps *taps = p->some_taps ? &p->taps : NULL;
  for (int k = 0; k < p->count; k++) {
    test_array *gradients[] = {&p->arrays[k].da, &p->arrays[k].db, &p->arrays[k].dscale};
    for (int n = 0; n < 3; n++)
      if (gradients[n]->block)
        all[count++] = gradients[n];
  }
  for (int k = 0; k < count; k++)
    fill_with_nan(all[k]);
  assert_int_equal(device->squeeze(&context, p->groups, &p->w.a, taps, p->count, p->terms), DEVICE_DONE);
  assert_int_equal(device->squeeze_backward(&context, p->groups, &p->dw.a, taps, p->count, p->terms), DEVICE_DONE);
  for (int k = 0; k < count; k++)
    assert_true(test_clean(all[k]));
  test_context_free(&context);
}

static void expect_small(double error, double tolerance, const problem *p, int term, const char *what) {
  if (error <= tolerance)
    return;
  print_error("%s of term %d (kind %d): error %.2e; kernel %dx%dx%dx%d, groups %d\n", what, term,
              term < 0 ? -1 : (int)p->terms[term].kind, error, (int)p->outputs, (int)p->channels, (int)p->height,
              (int)p->width, (int)p->groups);
  fail();
}

/* Against the formulae, for each instruction set. */
static void check(problem *p) {
  for_each_isa(device) {
    squeeze_both_ways(device, p);
    sums w = sums_new(test_count(&p->w.a));
    for (int k = 0; k < p->count; k++) {
      const device_term *t = &p->terms[k];
      sums da = sums_new(test_count(&t->a)), dscale = sums_new(t->scale.data ? t->scale.shape[0] : 0);
      sums db = sums_new(t->kind >= TERM_PRODUCT ? test_count(&t->b) : 0);
      sum_term(p, t, &w, &da, &db, &dscale);
      da.count *= t->da.data != NULL;
      db.count *= t->db.data != NULL;
      dscale.count *= t->dscale.data != NULL;
      expect_small(sums_error(&da, &t->da, true), 2e-6, p, k, "gradient of a");
      expect_small(sums_error(&db, &t->db, true), 2e-6, p, k, "gradient of b");
      expect_small(sums_error(&dscale, &t->dscale, false), 2e-6, p, k, "gradient of the scale");
    }
    expect_small(sums_error(&w, &p->w.a, true), 2e-6, p, -1, "kernel");
  }
}

/* ---- problems ---- */

/* The six branches of an OREPA block. */
static problem orepa_problem(int64_t groups, int64_t outputs, int64_t channels, int64_t k) {
  problem p = new_problem(groups, outputs, channels, k, k);
  int64_t inner = groups > 4 ? 2 * channels : channels;
  add_term(&p, (recipe){TERM_KERNEL, k, k, 0, false, 2, true, true, true});
  add_term(&p, (recipe){TERM_PATTERN, k, k, 0, true, 2, true, false, true});
  add_term(&p, (recipe){TERM_PATTERN, k, k, 0, false, 2, true, false, true});
  add_term(&p, (recipe){TERM_PRODUCT, k, k, inner, true, 2, true, true, true});
  if (k % 2)
    add_term(&p, (recipe){TERM_KERNEL, 1, 1, 0, false, 2, true, true, true});
  add_term(&p, (recipe){TERM_DEPTHWISE, k, k, 8, true, 2, true, true, true});
  return p;
}

static int64_t pick(uint64_t *seed, int64_t low, int64_t high) {
  return low + (int64_t)(test_random(seed) % (uint64_t)(high - low + 1));
}

/* A size at most `whole` that lies centred in it. */
static int64_t pick_centred(uint64_t *seed, int64_t whole) {
  return whole - 2 * pick(seed, 0, (whole - 1) / 2);
}

static problem random_problem(uint64_t seed) {
  static const int64_t sizes[] = {1, 2, 3, 5, 7}, some_groups[] = {1, 1, 2, 4, 8, 5};
  int64_t groups = some_groups[pick(&seed, 0, 5)], most = 40 / groups, height = sizes[pick(&seed, 0, 4)];
  int64_t width = pick(&seed, 0, 2) ? height : sizes[pick(&seed, 0, 4)];
  bool depthwise = pick(&seed, 0, 4) == 0;
  problem p = new_problem(groups, groups * pick(&seed, 1, most), depthwise ? 1 : pick(&seed, 1, most), height, width);
  int count = (int)pick(&seed, 1, MOST_TERMS);
  for (int k = 0; k < count; k++)
    add_term(&p, (recipe){.kind = (device_term_kind)pick(&seed, 0, 3),
                          .height = pick_centred(&seed, height),
                          .width = pick_centred(&seed, width),
                          .inner = pick(&seed, 0, 2) ? pick(&seed, 1, 8) : pick(&seed, 0, 2) * p.channels,
                          .mark = pick(&seed, 0, 1),
                          .scale = (int)pick(&seed, 0, 2),
                          .da = pick(&seed, 0, 3),
                          .db = pick(&seed, 0, 3),
                          .dscale = pick(&seed, 0, 3)});
  return p;
}

static void test_blocks(void **state) {
  (void)state;
  static const int64_t shapes[][4] = {/* groups, outputs, channels of a group, kernel size */
                                      {1, 16, 16, 3}, {1, 64, 3, 3},   {1, 40, 24, 3},  {2, 24, 12, 5},
                                      {8, 32, 4, 3},  {32, 64, 2, 3},  {24, 24, 1, 3},  {12, 24, 1, 7},
                                      {1, 96, 64, 3}, {1, 64, 128, 3}, {1, 128, 96, 1}, {4, 32, 40, 2},
                                      {1, 1, 1, 3},   {1, 300, 16, 3}, {1, 64, 288, 1}};
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; n++) {
    problem p = orepa_problem(shapes[n][0], shapes[n][1], shapes[n][2], shapes[n][3]);
    check(&p);
    free_problem(&p);
  }
}

static void test_random_terms(void **state) {
  (void)state;
  for (uint64_t seed = 1; seed <= 150; seed++) {
    problem p = random_problem(seed);
    check(&p);
    free_problem(&p);
  }
}

/* From here on only these taps are used, and the others have no gradient. */
static void use_taps(problem *p, orepa_taps taps) {
  p->some_taps = true;
  p->taps = taps;
  for (int64_t o = 0; o < p->outputs; o++)
    for (int64_t h = 0; h < p->height; h++)
      for (int64_t w = 0; w < p->width; w++)
        for (int64_t i = 0; i < p->channels && !is_used(p, h, w); i++)
          ((float *)p->dw.a.data)[kernel_position(&p->dw.a, o, i, h, w)] = 0;
}

static void test_some_taps(void **state) {
  (void)state;
  for (uint64_t seed = 1; seed <= 80; seed++) {
    problem p = seed % 4 ? random_problem(seed) : orepa_problem(1, 40, 24, 3);
    uint64_t picks = seed;
    orepa_taps taps;
    for (int d = 0; d < 2; d++) { /* none at all now and then */
      taps.first[d] = pick(&picks, 0, d ? p.width : p.height);
      taps.last[d] = pick(&picks, taps.first[d], d ? p.width : p.height);
    }
    use_taps(&p, seed == 4 ? (orepa_taps){{1, 1}, {2, 2}} : taps);
    check(&p);
    free_problem(&p);
  }
}

static void test_empty(void **state) {
  (void)state;
  static const int64_t shapes[][2] = {{0, 5}, {6, 0}, {0, 0}, {6, 5}};
  for (int n = 0; n < 4; n++) {
    problem p = new_problem(2, shapes[n][0], shapes[n][1], 3, 3);
    add_term(&p, (recipe){TERM_KERNEL, 3, 3, 0, false, 2, true, false, true});
    add_term(&p, (recipe){TERM_PATTERN, 3, 3, 0, false, 1, true, false, true});
    add_term(&p, (recipe){TERM_PRODUCT, 3, 3, 4, true, 2, true, true, true});
    add_term(&p, (recipe){TERM_PRODUCT, 1, 3, 0, true, 2, true, true, true});
    add_term(&p, (recipe){TERM_DEPTHWISE, 3, 3, 4, true, 1, true, true, true});
    add_term(&p, (recipe){TERM_DEPTHWISE, 3, 1, 0, false, 1, true, true, true});
    check(&p);
    p.count = 0; /* a sum of nothing */
    check(&p);
    p.count = 6;
    free_problem(&p);
  }
}

static void test_threads(void **state) {
  (void)state;
  int before = omp_get_max_threads();
  static const int64_t shapes[][3] = {{1, 96, 72}, {1, 128, 128}, {2, 50, 90}, {8, 256, 16}, {256, 256, 1}};
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; n++)
    for_each_isa(device) {
      problem one = orepa_problem(shapes[n][0], shapes[n][1], shapes[n][2], 3);
      problem many = orepa_problem(shapes[n][0], shapes[n][1], shapes[n][2], 3);
      omp_set_num_threads(1);
      squeeze_both_ways(device, &one);
      for (int threads = 2; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        squeeze_both_ways(device, &many);
        assert_true(test_same(&many.w.a, &one.w.a));
        for (int k = 0; k < one.count; k++) {
          assert_true(test_same(&many.terms[k].da, &one.terms[k].da));
          assert_true(!one.terms[k].db.data || test_same(&many.terms[k].db, &one.terms[k].db));
          assert_true(test_same(&many.terms[k].dscale, &one.terms[k].dscale));
        }
      }
      omp_set_num_threads(before);
      free_problem(&one);
      free_problem(&many);
    }
}

static void test_unsupported(void **state) {
  (void)state;
  for_each_isa(device) {
    device_context context = test_context(device);
    problem p = new_problem(1, 4, 4, 3, 3);
    add_term(&p, (recipe){TERM_KERNEL, 2, 2, 0, false, 0, true, false, false}); /* 2x2 has no centre in 3x3 */
    assert_int_equal(device->squeeze(&context, 1, &p.w.a, NULL, 1, p.terms), DEVICE_UNSUPPORTED);
    assert_int_equal(device->squeeze_backward(&context, 1, &p.dw.a, NULL, 1, p.terms), DEVICE_UNSUPPORTED);
    test_array w = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, p.w.a.shape);
    assert_int_equal(device->squeeze(&context, 1, &w.a, NULL, 0, NULL), DEVICE_UNSUPPORTED);
    test_release(&w);
    free_problem(&p);
    test_context_free(&context);
  }
}

/* ---- composed kernels ---- */

typedef struct {
  orepa_dtype dtype;
  int64_t groups, na, nb;
  bool turn;
  test_array after, before, w, dw, dafter, dbefore;
} composed;

/* `each` counts the channels of a group: outputs of na's, inputs of nb's, and of the middle, of na * nb's. */
static composed new_composed(orepa_dtype dtype, int64_t groups, int64_t na, int64_t nb, const int64_t each[3],
                             const int64_t after[2], const int64_t before[2], bool turn) {
  composed c = {.dtype = dtype, .groups = groups, .na = na, .nb = nb, .turn = turn};
  int64_t outputs = na * each[0], inputs = nb * each[1], middle = na * nb * each[2];
  c.after = new_kernel(dtype, outputs, middle / na, after[0], after[1], 1);
  c.before = new_kernel(dtype, middle, inputs / nb, before[0], before[1], 2);
  c.dw = new_kernel(dtype, outputs, inputs / groups, after[0] + before[0] - 1, after[1] + before[1] - 1, 3);
  c.w = test_copy(&c.dw);
  c.dafter = test_copy(&c.after);
  c.dbefore = test_copy(&c.before);
  return c;
}

static void free_composed(composed *c) {
  test_array *all[] = {&c->after, &c->before, &c->w, &c->dw, &c->dafter, &c->dbefore};
  for (int n = 0; n < 6; n++)
    test_release(all[n]);
}

static void compose_all_ways(const orepa_device *device, composed *c) {
  device_context context = test_context(device);
  test_array *results[] = {&c->w, &c->dafter, &c->dbefore};
  for (int n = 0; n < 3; n++)
    fill_with_nan(results[n]);
  assert_int_equal(device->compose(&context, &c->w.a, &c->after.a, c->na, &c->before.a, c->nb, c->groups, c->turn),
                   DEVICE_DONE);
  assert_int_equal(
      device->compose_backward_after(&context, &c->dafter.a, c->na, &c->dw.a, &c->before.a, c->nb, c->groups, c->turn),
      DEVICE_DONE);
  assert_int_equal(
      device->compose_backward_before(&context, &c->dbefore.a, c->nb, &c->dw.a, &c->after.a, c->na, c->groups, c->turn),
      DEVICE_DONE);
  for (int n = 0; n < 3; n++)
    assert_true(test_clean(results[n]));
  test_context_free(&context);
}

static int64_t logical_position(const device_array *a, int64_t o, int64_t i, int64_t h, int64_t w) {
  return ((o * a->shape[1] + i) * a->shape[2] + h) * a->shape[3] + w;
}

/* Adds every product after[o,t,h,x] * before[t,i,y,z] where it belongs. */
static void sum_composed(const composed *c, sums *w, sums *dafter, sums *dbefore) {
  const device_array *after = &c->after.a, *before = &c->before.a;
  int64_t O = after->shape[0], T = after->shape[1], M = before->shape[0], I = before->shape[1];
  for (int64_t o = 0; o < O; o++)
    for (int64_t t = 0; t < T; t++) {
      int64_t m = o / (O / c->na) * T + t, first = I ? m / (M / c->nb) * I % c->w.a.shape[1] : 0;
      for (int64_t tap = 0; tap < after->shape[2] * after->shape[3] * before->shape[2] * before->shape[3]; tap++) {
        int64_t z = tap % before->shape[3], y = tap / before->shape[3] % before->shape[2];
        int64_t a = tap / before->shape[3] / before->shape[2], x = a % after->shape[3], h = a / after->shape[3];
        int64_t left = c->turn ? logical_position(after, o, t, after->shape[2] - 1 - h, after->shape[3] - 1 - x)
                               : logical_position(after, o, t, h, x);
        for (int64_t i = 0; i < I; i++) {
          int64_t at = logical_position(&c->w.a, o, first + i, h + y, x + z);
          int64_t right = logical_position(before, m, i, y, z);
          double p = test_get(after, left), q = test_get(before, right), d = test_get(&c->dw.a, at);
          sums_add(w, at, p * q);
          sums_add(dafter, left, d * q);
          sums_add(dbefore, right, d * p);
        }
      }
    }
}

static void check_composed(composed *c) {
  double tolerance = c->dtype == OREPA_FLOAT64 ? 1e-13 : 2e-6;
  for_each_isa(device) {
    compose_all_ways(device, c);
    sums w = sums_new(test_count(&c->w.a)), dafter = sums_new(test_count(&c->after.a));
    sums dbefore = sums_new(test_count(&c->before.a));
    sum_composed(c, &w, &dafter, &dbefore);
    assert_true(sums_error(&w, &c->w.a, false) <= tolerance);
    assert_true(sums_error(&dafter, &c->dafter.a, false) <= tolerance);
    assert_true(sums_error(&dbefore, &c->dbefore.a, false) <= tolerance);
  }
}

static void test_compose(void **state) {
  (void)state;
  for (uint64_t n = 1; n <= 120; n++) {
    uint64_t seed = n;
    int64_t groups = pick(&seed, 1, 3), na = groups * pick(&seed, 1, 3), nb = groups * pick(&seed, 1, 3);
    int64_t each[3] = {pick(&seed, 1, 6), pick(&seed, 1, 9), pick(&seed, 1, 5)};
    int64_t after[2] = {pick(&seed, 1, 4), pick(&seed, 1, 4)}, before[2] = {pick(&seed, 1, 3), pick(&seed, 1, 4)};
    if (n % 10 == 0)
      each[pick(&seed, 0, 2)] = 0;
    composed c =
        new_composed(n % 2 ? OREPA_FLOAT64 : OREPA_FLOAT32, groups, na, nb, each, after, before, pick(&seed, 0, 1));
    check_composed(&c);
    free_composed(&c);
  }
  composed c =
      new_composed(OREPA_FLOAT32, 1, 1, 1, (int64_t[]){40, 150, 300}, (int64_t[]){3, 1}, (int64_t[]){1, 3}, true);
  check_composed(&c); /* larger than a block in every direction */
  free_composed(&c);
}

static void test_compose_against_ref(void **state) {
  (void)state;
  for (int n = 0; n < 4; n++)
    for_each_isa(device) {
      composed own = new_composed(n % 2 ? OREPA_FLOAT64 : OREPA_FLOAT32, 2, 4, 6, (int64_t[]){3, 5, 1},
                                  (int64_t[]){3, 2}, (int64_t[]){3, 3}, n / 2);
      composed ref =
          new_composed(own.dtype, 2, 4, 6, (int64_t[]){3, 5, 1}, (int64_t[]){3, 2}, (int64_t[]){3, 3}, n / 2);
      double tolerance = own.dtype == OREPA_FLOAT64 ? 1e-13 : 2e-6;
      compose_all_ways(device, &own);
      compose_all_ways(ref_device(), &ref);
      assert_true(test_error(&own.w.a, &ref.w.a) <= tolerance);
      assert_true(test_error(&own.dafter.a, &ref.dafter.a) <= tolerance);
      assert_true(test_error(&own.dbefore.a, &ref.dbefore.a) <= tolerance);
      free_composed(&own);
      free_composed(&ref);
    }
}

static void test_compose_threads(void **state) {
  (void)state;
  int before = omp_get_max_threads();
  for (int n = 0; n < 3; n++)
    for_each_isa(device) {
      composed c[3];
      for (int threads = 1; threads <= 3; threads++) {
        c[threads - 1] = new_composed(n % 2 ? OREPA_FLOAT64 : OREPA_FLOAT32, 1, 1, n == 2 ? 40 : 1,
                                      (int64_t[]){70, n == 2 ? 2 : 65, n == 2 ? 3 : 90}, (int64_t[]){3, 3},
                                      (int64_t[]){1, 3}, false);
        omp_set_num_threads(threads);
        compose_all_ways(device, &c[threads - 1]);
        assert_true(test_same(&c[threads - 1].w.a, &c[0].w.a));
        assert_true(test_same(&c[threads - 1].dafter.a, &c[0].dafter.a));
        assert_true(test_same(&c[threads - 1].dbefore.a, &c[0].dbefore.a));
      }
      for (int k = 0; k < 3; k++)
        free_composed(&c[k]);
      omp_set_num_threads(before);
    }
}

static void test_compose_unsupported(void **state) {
  (void)state;
  for_each_isa(device) {
    device_context context = test_context(device);
    composed c =
        new_composed(OREPA_BFLOAT16, 1, 1, 1, (int64_t[]){2, 2, 2}, (int64_t[]){3, 3}, (int64_t[]){1, 1}, false);
    assert_int_equal(device->compose(&context, &c.w.a, &c.after.a, 1, &c.before.a, 1, 1, false), DEVICE_UNSUPPORTED);
    free_composed(&c);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_blocks),          cmocka_unit_test(test_random_terms),
      cmocka_unit_test(test_some_taps),       cmocka_unit_test(test_empty),
      cmocka_unit_test(test_threads),         cmocka_unit_test(test_unsupported),
      cmocka_unit_test(test_compose),         cmocka_unit_test(test_compose_against_ref),
      cmocka_unit_test(test_compose_threads), cmocka_unit_test(test_compose_unsupported),
  };
  return cmocka_run_group_tests_name("squeezing and composing on the cpu", tests, NULL, NULL);
}
