from jaxgrad.check.gradient import assert_gradient as assert_gradient
from jaxgrad.check.gradient import check_gradient as check_gradient
from jaxgrad.check.report import Finding as Finding
from jaxgrad.check.report import Report as Report
