"""This package has the rules for convolutions of one to three axes, including transposed convolutions."""

from clipgrad.rules.convolution import convolution as convolution
