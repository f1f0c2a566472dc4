-- Answers: which product files of this MOUS does the archive have, of any class?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: NGAS_FILE_ID  the name of the file in the archive
--          FILE_CLASS    calibration, script, science, ...
-- Rows:    one for each file; none means that nothing was ingested.
SELECT DISTINCT
    product.NGAS_FILE_ID,
    product.FILE_CLASS
FROM ALMA.ASA_PRODUCT_FILES product
WHERE product.ASA_OUS_ID = :mous_uid
