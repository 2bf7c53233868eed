/* data.h: the options of a batch of images, for the bindings that take them. */
#ifndef OREPA_BIND_DATA_H
#define OREPA_BIND_DATA_H

#include "bind.h"
#include "orepa_data.h"

enum { BIND_MAX_CHANNELS = 64 };

typedef struct {
  orepa_image_transform transform; /* mean and deviation lie behind it */
  float mean[BIND_MAX_CHANNELS], deviation[BIND_MAX_CHANNELS];
} bind_image_options;

/* {padding=, crop=, flip=, augment=, mean=, deviation=, seed=, epoch=} at `options`; `function` is for messages. */
void bind_image_transform(lua_State *L, int options, const char *function, bind_image_options *o);

#endif
